# SPDX-License-Identifier: Apache-2.0
"""What an evaluation works on and what it finds, whichever engine runs the models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_eigen.calibration.evaluation.metrics import Quality
from vllm_eigen.calibration.evaluation.questions import Accuracy
from vllm_eigen.calibration.evaluation.scoring import Scorer
from vllm_eigen.calibration.evaluation.taskset import TaskSet
from vllm_eigen.calibration.model.source import Source
from vllm_eigen.checkpoint.config import EigenConfig
from vllm_eigen.common.progress import Reporter

Accuracies = dict[str, Accuracy]
"""By task."""


@dataclass(frozen=True)
class Inputs:
    """A checkpoint, its base, and the text and tasks for both.

    Attributes:
        folder: the Eigen checkpoint.
        eigen: its `eigen` section.
        base: the base model.
        windows: the text, [num_windows, length].
        tasks: the questions.
        max_length: most tokens of a question with its answer.
        fp8_cache: whether the checkpoint's cache is fp8; the base's keeps the model's type.
    """

    folder: Path
    eigen: EigenConfig
    base: Source
    windows: torch.Tensor
    tasks: TaskSet
    max_length: int
    fp8_cache: bool

    def accuracies(self, stage: str, scorer: Scorer, reporter: Reporter) -> Accuracies:
        """One model's accuracy on the tasks."""
        if not self.tasks.questions:
            return {}
        reporter.stage(stage, self.tasks.questions)
        return self.tasks.accuracy(scorer, self.base.tokenizer(), self.max_length, reporter.step)


@dataclass(frozen=True)
class Evaluation:
    """Quality on a text, and accuracy of base and compressed model by task.

    Attributes:
        window: tokens of a window of the text.
        notes: what could not be measured, and why.
    """

    quality: Quality
    eigen: EigenConfig
    tasks: dict[str, tuple[Accuracy, Accuracy]]
    window: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        quality: Quality,
        base: Accuracies,
        eigen: Accuracies,
        notes: tuple[str, ...] = (),
    ) -> Evaluation:
        """Put what was found about both models together."""
        tasks = {name: (accuracy, eigen[name]) for name, accuracy in base.items()}
        return cls(quality, inputs.eigen, tasks, inputs.windows.shape[1], notes)
