"""Do served models score as the offline evaluation says? lm-evaluation-harness against both.

    python -m benchmarks.served_tasks --base MODEL --eigen DIR --questions FILE.jsonl

The same multiple-choice questions go, as one task of the harness, through its `local-completions`
client to a running server, and through the offline evaluation of `vllm-eigen evaluate` in
transformers. Scores must agree within half a point. Servers compute in float32 unless `--dtype`
says otherwise, so that what differs is the path and not the rounding.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.serving.endpoint import Endpoint
from calibration.interrupt import terminate_as_interrupt
from calibration.progress import Reporter
from calibration.tasks import Accuracy, read_questions
from server.process import start
from vllm_eigen import provenance
from vllm_eigen.errors import EigenError, EngineError, UsageError
from vllm_eigen.files import atomic_file

STARTUP_SECONDS = 600.0
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
    from calibration.harness import HarnessTasks
    from calibration.scoring import transformers_scorer
    from calibration.source import open_source
    from calibration.stream import pick_device
    from calibration.unfold import load_base, load_reference

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run both ways and compare; 0 if all scores agree."""
    args = _parser().parse_args(argv)
    try:
        with terminate_as_interrupt(), Reporter() as reporter:
            rows = _run(args, reporter)
    except EigenError as error:
        print(f"served_tasks: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("served_tasks: interrupted", file=sys.stderr)
        return 130
    for row in rows:
        verdict = "agrees" if row.gap <= args.tolerance else "DIFFERS"
        print(
            f"{row.side:<6} {row.metric:<9} served {row.served:6.2f}  offline {row.offline:6.2f}  "
            f"gap {row.gap:.2f} points over {row.questions} questions: {verdict}"
        )
    if args.json is not None:
        document: dict[str, Any] = {
            "questions": args.questions.name,
            "dtype": args.dtype,
            "tolerance": args.tolerance,
            "scores": [asdict(row) for row in rows],
            "provenance": provenance.collect(),
        }
        with atomic_file(args.json) as work:
            work.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(any(row.gap > args.tolerance for row in rows))


def _run(args: argparse.Namespace, reporter: Reporter) -> list[Comparison]:
    if find_spec("lm_eval") is None or find_spec("tenacity") is None:
        raise UsageError("lm_eval is missing; install the project with its [bench] extra")
    if (args.base_url is None) != (args.eigen_url is None):
        raise UsageError("give both --base-url and --eigen-url, or neither")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    served = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        task = write_task(args.questions, folder)
        offline = ask_offline(args.base, args.eigen, task, folder, args.limit, reporter)
        sides = (("base", args.base, args.base_url), ("eigen", str(args.eigen), args.eigen_url))
        for side, model, url in sides:
            reporter.note(f"{side}: {'asking ' + url if url else 'starting vLLM'} ...")
            if url is not None:
                served[side] = ask_server(Endpoint(url), args.base, task, folder, args.limit)
                continue
            options = ("--dtype", args.dtype, "--kv-cache-memory-bytes", str(args.pool_mib << 20))
            with start(model, *options, log=folder / f"{side}.log") as server:
                server.wait_ready(STARTUP_SECONDS)
                endpoint = Endpoint(server.url)
                served[side] = ask_server(endpoint, args.base, task, folder, args.limit)
    return compare(served, offline)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.served_tasks", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--base", required=True, metavar="MODEL", help="uncompressed model")
    parser.add_argument("--eigen", required=True, type=Path, metavar="DIR", help="its checkpoint")
    parser.add_argument(
        "--questions", required=True, type=Path, metavar="FILE", help="jsonl of ctx, choices, gold"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first N questions")
    parser.add_argument("--tolerance", type=float, default=0.5, metavar="POINTS")
    parser.add_argument("--dtype", default="float32", help="of the servers started here (float32)")
    parser.add_argument("--pool-mib", type=int, default=64, help="KV pool of each, MiB (64)")
    parser.add_argument("--base-url", metavar="URL", help="a running server instead")
    parser.add_argument("--eigen-url", metavar="URL", help="the same for Eigen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
