# SPDX-License-Identifier: Apache-2.0
"""Scores of multiple-choice questions, as served and by the offline evaluation.

Part of `bench served-tasks`. Both ask lm-evaluation-harness for the same task.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_eigen.benchmarks.lib.endpoint import Endpoint
from vllm_eigen.calibration.evaluation.questions import Accuracy, read_questions
from vllm_eigen.common.errors import EngineError
from vllm_eigen.common.progress import Reporter

METRICS = ("acc", "acc_norm")
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@dataclass(frozen=True)
class Comparison:
    """One score of one model, served and offline, in percent."""

    side: str
    metric: str
    served: float
    offline: float
    questions: int

    @property
    def gap(self) -> float:
        """Points between the two."""
        return abs(self.served - self.offline)


def write_task(questions: Path, folder: Path) -> str:
    """Describe a jsonl file of `ctx`, `choices`, `gold` to the harness; returns the task's name.

    Choices are plain continuations here: a `_` in the context has no special meaning.

    Raises:
        InputError: the file holds no questions.
    """
    read_questions(questions)
    name = f"local_{questions.stem}"
    text = TASK.format(name=name, file=json.dumps(str(questions.resolve())))
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return name


def ask_server(
    endpoint: Endpoint, tokenizer: str, task: str, folder: Path, limit: int | None
) -> dict[str, float]:
    """Scores in percent that lm_eval's `local-completions` model gets from a server.

    Raises:
        EngineError: the server does not answer as it must.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    options = {
        "model": endpoint.model(),
        "base_url": f"{endpoint.url}/v1/completions",
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        # By default this client leaves out what the tokenizer puts before a text.
        "add_bos_token": True,
        "max_length": int(endpoint.kv_cache()["max_model_len"]) - 1,
        "num_concurrent": 4,
        "max_retries": 1,
    }
    os.environ.setdefault("OPENAI_API_KEY", "none")
    try:
        found = simple_evaluate(
            model="local-completions",
            model_args=options,
            tasks=[task],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EngineError(f"lm_eval failed at {endpoint.url}: {reason}") from error
    scores: dict[str, Any] = (found or {})["results"][task]
    return {metric: 100 * float(scores[f"{metric},none"]) for metric in METRICS}


def ask_offline(
    base: str, eigen: Path | None, task: str, folder: Path, limit: int | None, reporter: Reporter
) -> dict[str, Accuracy]:
    """Scores of the models by the offline evaluation, in transformers and float32."""
    from vllm_eigen.calibration.evaluation.harness import HarnessTasks
    from vllm_eigen.calibration.evaluation.scoring import transformers_scorer
    from vllm_eigen.calibration.model.compressed import load_reference
    from vllm_eigen.calibration.model.device import pick_device
    from vllm_eigen.calibration.model.source import open_source
    from vllm_eigen.calibration.model.transformers_model import load_base

    device = pick_device("auto")
    source = open_source(base)
    tasks = HarnessTasks([task], folder)
    choices = sum(tasks.questions(limit).values())
    found = {}
    for side, checkpoint in (("base", None), ("eigen", eigen)):
        if side == "eigen" and checkpoint is None:
            continue
        model = load_reference(checkpoint, device) if checkpoint else load_base(source, device)
        reporter.stage(f"offline {side}", choices)
        scores = tasks.accuracy(
            transformers_scorer(model),
            source.tokenizer(),
            length=source.max_positions - 1,
            limit=limit,
        )
        found[side] = scores[task]
    return found


def compare(
    served: Mapping[str, Mapping[str, float]], offline: Mapping[str, Accuracy]
) -> list[Comparison]:
    """Pair the scores of both ways by model and metric."""
    return [
        Comparison(
            side, metric, served[side][metric], 100 * getattr(scores, metric), scores.questions
        )
        for side, scores in offline.items()
        for metric in METRICS
    ]
