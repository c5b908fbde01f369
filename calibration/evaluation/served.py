# SPDX-License-Identifier: Apache-2.0
"""Evaluation of both models as vLLM serves them, one after the other.

Both read the same token windows. What the base model predicts is kept until the checkpoint's
predictions are there.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from vllm_eigen.calibration.evaluation.engine import Engine
from vllm_eigen.calibration.evaluation.inputs import Evaluation, Inputs
from vllm_eigen.calibration.evaluation.metrics import Comparison, Quality, kl_sum
from vllm_eigen.calibration.evaluation.scoring import logprobs_scorer
from vllm_eigen.calibration.model.activations import allocate
from vllm_eigen.common.progress import Reporter

MAX_VOCAB_LOGPROBS = 1 << 23
"""Log-probabilities of one window up to which KL is measured: vLLM hands them over as Python
numbers, about 100 bytes each."""
MEMORY_LIMIT = 4 << 30
"""Bytes of the base model's distributions kept in memory; more are memory-mapped."""


def evaluate_served(inputs: Inputs, reporter: Reporter) -> Evaluation:
    """Serve and measure the base, then the checkpoint.

    Raises:
        EngineError: vLLM cannot serve one of the models.
        OutputError: the disk is too small for the base model's distributions.
    """
    windows, base = inputs.windows, inputs.base
    notes: tuple[str, ...] = ()
    vocab_size: int | None = base.vocab_size
    if windows.shape[1] * base.vocab_size > MAX_VOCAB_LOGPROBS:
        vocab_size = None
        notes = (
            f"KL is not measured: it needs the whole vocabulary of {base.vocab_size:,} at each "
            "token, more than vLLM can hand over; use --engine transformers",
        )
    size: dict[str, Any] = {
        "length": inputs.max_length if inputs.tasks.questions else windows.shape[1],
        "token_bytes": inputs.eigen.uncompressed_bytes_per_token(4),
    }
    reporter.stage("start base", 1)
    with Engine(base.folder, **size) as engine:
        reporter.stage("base", len(windows))
        record = BaseRecord(engine, windows, vocab_size, reporter)
        before = inputs.accuracies("base tasks", logprobs_scorer(engine.logprobs), reporter)
    reporter.stage("start eigen", 1)
    if inputs.fp8_cache:
        size["kv_cache_dtype"] = "fp8"
    with Engine(inputs.folder, **size) as engine:
        reporter.stage("eigen", len(windows))
        quality = record.compare(engine, reporter)
        after = inputs.accuracies("eigen tasks", logprobs_scorer(engine.logprobs), reporter)
    return Evaluation.of(inputs, quality, before, after, notes)


class BaseRecord:
    """The base model's predictions, until the checkpoint's are measured.

    Args:
        windows: the text, [num_windows, length].
        vocab_size: to keep whole distributions; None leaves KL unknown.

    Raises:
        OutputError: the disk is too small for the distributions.
    """

    def __init__(
        self, engine: Engine, windows: torch.Tensor, vocab_size: int | None, reporter: Reporter
    ) -> None:
        self._windows, self._vocab_size = windows, vocab_size
        count, length = windows.shape
        self._logprobs = torch.empty(count, length - 1)
        self._top1 = torch.empty(count, length - 1, dtype=torch.int64)
        self._vocab_logprobs: torch.Tensor | None = None
        if vocab_size is not None:
            self._vocab_logprobs = allocate((count, length - 1, vocab_size), MEMORY_LIMIT)
        for row, found in enumerate(engine.logprobs(windows.tolist(), vocab_size)):
            self._logprobs[row], self._top1[row] = found.logprobs, found.top1
            if self._vocab_logprobs is not None and found.vocab_logprobs is not None:
                self._vocab_logprobs[row] = found.vocab_logprobs
            reporter.step()

    def compare(self, engine: Engine, reporter: Reporter) -> Quality:
        """Quality of the model that `engine` serves, on the same windows."""
        comparison = Comparison()
        rows = engine.logprobs(self._windows.tolist(), self._vocab_size)
        for row, found in enumerate(rows):
            kl = math.nan
            if self._vocab_logprobs is not None and found.vocab_logprobs is not None:
                kl = kl_sum(self._vocab_logprobs[row], found.vocab_logprobs)
            agree = self._top1[row] == found.top1
            comparison.add_logprobs(self._logprobs[row], found.logprobs, agree, kl)
            reporter.step()
        return comparison.result()
