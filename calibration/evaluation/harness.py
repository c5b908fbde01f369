# SPDX-License-Identifier: Apache-2.0
"""Tasks by name through EleutherAI's lm-evaluation-harness (`lm_eval`, an optional package).

The harness reads the data set, writes the prompts and counts the right answers; a `Scorer` is its
model. Only multiple-choice tasks are supported, such as PIQA, WinoGrande, ARC and HellaSwag.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from vllm_eigen.calibration.evaluation.questions import Accuracy
from vllm_eigen.calibration.evaluation.scoring import Continuation, Scorer
from vllm_eigen.common.errors import InputError, UsageError, first_line

for _name in ("lm_eval", "huggingface_hub"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # errors are raised as ours


class HarnessTasks:
    """Tasks of the harness, with their questions loaded.

    Args:
        names: tasks, tags or groups.
        folder: YAML task descriptions besides the harness's own.

    Raises:
        UsageError: a name is unknown.
        InputError: a data set cannot be loaded.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise UsageError(f"--include-path {folder} is not a folder of lm_eval's YAML files")
        manager = TaskManager(include_path=folder)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise UsageError(
                f"--tasks {unknown[0]}: neither a file nor a task that lm_eval knows; "
                "pass --include-path DIR for tasks of your own"
            )
        self._loaded: dict[str, Any] = {"tasks": {}}
        for name in names:
            try:
                found: Any = manager.load([name])
            except Exception as error:
                raise InputError(
                    f"task {name} cannot be loaded ({first_line(error)}); its data set comes from "
                    "the Hugging Face hub, or pass a local jsonl file"
                ) from error
            self._loaded["tasks"].update(found["tasks"])
        for name, task in self._loaded["tasks"].items():
            if task.OUTPUT_TYPE != "multiple_choice":
                raise UsageError(
                    f"--tasks {name} is a task of type {task.OUTPUT_TYPE}; only multiple choice "
                    "can be evaluated"
                )

    def questions(self, limit: int | None) -> dict[str, int]:
        """Number of questions by task, at most `limit` each."""
        counts = {name: len(task.eval_docs) for name, task in self._loaded["tasks"].items()}
        return {name: min(count, limit or count) for name, count in counts.items()}

    def accuracy(
        self,
        scorer: Scorer,
        tokenizer: Any,
        *,
        length: int,
        limit: int | None,
        step: Callable[[], None] = lambda: None,
    ) -> dict[str, Accuracy]:
        """Accuracy by task; `step` is called once a question."""
        model = _Model(scorer, tokenizer, length, step)
        found: Any = evaluate(model, self._loaded, limit, bootstrap_iters=0, log_samples=False)
        scores = {}
        for name, count in self.questions(limit).items():
            measured = found["results"][name]
            if "acc,none" not in measured:
                raise UsageError(f"--tasks {name} gives no accuracy")
            scores[name] = Accuracy(measured["acc,none"], measured.get("acc_norm,none"), count)
        return scores


class _Model(TemplateLM):
    """A scorer behind the harness's model interface."""

    def __init__(
        self, scorer: Scorer, tokenizer: Any, length: int, step: Callable[[], None]
    ) -> None:
        super().__init__()
        self._scorer, self._length, self._step = scorer, length, step
        self.tokenizer = tokenizer

    @property
    def eot_token_id(self) -> int:
        """Precedes a text without context, where there is no beginning-of-text token."""
        return int(self.tokenizer.eos_token_id or 0)

    @property
    def prefix_token_id(self) -> int:
        """Precedes a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text, by default with the tokenizer's special tokens."""
        special = True if add_special_tokens is None else add_special_tokens
        tokens: list[int] = self.tokenizer.encode(string, add_special_tokens=special)
        return tokens

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """As in the harness, but one question after the other, without its progress bar."""
        results: list[tuple[float, bool]] = []
        for _, group in groupby(requests, lambda item: (item.task_name, item.doc_id)):
            results += super().loglikelihood(list(group), disable_tqdm=True)
            self._step()
        return results

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return list(
            self._scorer(
                Continuation((context + text)[-self._length :], len(text))
                for _, context, text in requests
            )
        )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> NoReturn:
        """Multiple choice does not use it."""
        raise UsageError("only multiple-choice tasks can be evaluated")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> NoReturn:
        """Multiple choice does not use it."""
        raise UsageError("only multiple-choice tasks can be evaluated")
