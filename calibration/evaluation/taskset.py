# SPDX-License-Identifier: Apache-2.0
"""The tasks of one evaluation: local files of questions and tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.calibration.evaluation.questions import Accuracy, Question, accuracy, read_questions
from vllm_eigen.calibration.evaluation.scoring import Scorer
from vllm_eigen.common.errors import UsageError
from vllm_eigen.common.packages import missing_package

if TYPE_CHECKING:
    from vllm_eigen.calibration.evaluation.harness import HarnessTasks


class TaskSet:
    """The questions for both models.

    Args:
        names: jsonl files and names of lm-evaluation-harness, each perhaps several with commas.
        folder: YAML descriptions of more harness tasks.
        limit: most questions of each task.

    Raises:
        UsageError: a name is unknown or appears twice.
        InstallError: the harness is not installed.
        InputError: a file or data set cannot be read.
    """

    def __init__(
        self, names: Sequence[str] = (), folder: Path | None = None, limit: int | None = None
    ) -> None:
        if limit is not None and limit < 1:
            raise UsageError(f"--limit {limit} is out of range; it is at least 1")
        self._limit = limit
        parts = [part for name in names for part in _split(name)]
        files = [Path(part) for part in parts if _is_file(part)]
        self._files: dict[str, list[Question]] = {}
        for path in files:
            if path.stem in self._files:
                raise UsageError(f"--tasks names {path.stem} twice; rename one of the files")
            self._files[path.stem] = read_questions(path, limit)
        named = [part for part in parts if not _is_file(part)]
        self._harness = _harness(named, folder) if named else None
        counts = {} if self._harness is None else self._harness.questions(limit)
        twice = sorted(set(counts) & set(self._files))
        if twice:
            raise UsageError(f"--tasks names {twice[0]} twice; rename the file")
        self.questions: int = sum(map(len, self._files.values())) + sum(counts.values())
        """Number of questions, over all tasks."""

    def accuracy(
        self, scorer: Scorer, tokenizer: Any, length: int, step: Callable[[], None]
    ) -> dict[str, Accuracy]:
        """Accuracy of one model by task; calls `step` once a question.

        Args:
            length: most tokens of a question with its answer.
        """
        scores = {
            name: accuracy(scorer, tokenizer, questions, length=length, step=step)
            for name, questions in self._files.items()
        }
        if self._harness is not None:
            scores |= self._harness.accuracy(
                scorer, tokenizer, length=length, limit=self._limit, step=step
            )
        return scores


def _split(name: str) -> list[str]:
    return [name] if _is_file(name) else [part for part in name.split(",") if part]


def _is_file(name: str) -> bool:
    return name.endswith(".jsonl") or Path(name).is_file()


def _harness(names: Sequence[str], folder: Path | None) -> HarnessTasks:
    try:
        from vllm_eigen.calibration.evaluation.harness import HarnessTasks
    except ModuleNotFoundError as error:
        instead = "or pass a jsonl file of ctx, choices and gold"
        raise missing_package(error, instead) or error from error
    return HarnessTasks(names, folder)
