# SPDX-License-Identifier: Apache-2.0
"""Evaluation in plain transformers, in float32.

The models differ by the compression and its rounding alone.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_eigen.calibration.evaluation.inputs import Evaluation, Inputs
from vllm_eigen.calibration.evaluation.metrics import Comparison
from vllm_eigen.calibration.evaluation.scoring import transformers_scorer
from vllm_eigen.calibration.export.scales import fp8_cache
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.calibration.model.transformers_model import load_base
from vllm_eigen.common.progress import Reporter


def evaluate_offline(inputs: Inputs, device: torch.device, reporter: Reporter) -> Evaluation:
    """Run both models side by side; an fp8 cache is simulated.

    Raises:
        CheckpointError, InputError: the checkpoint or its base is damaged.
    """
    reporter.stage("loading", 2)
    eigen = load_reference(inputs.folder, device, fp8_cache if inputs.fp8_cache else None)
    reporter.step()
    base = load_base(inputs.base, device)
    reporter.step()
    reporter.stage("evaluating", len(inputs.windows))
    comparison = Comparison()
    for window in torch.split(inputs.windows, 1):
        comparison.add(_logits(base, window), _logits(eigen, window), window)
        reporter.step()
    before = inputs.accuracies("base tasks", transformers_scorer(base), reporter)
    after = inputs.accuracies("eigen tasks", transformers_scorer(eigen), reporter)
    return Evaluation.of(inputs, comparison.result(), before, after)


def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(window.to(model.device), use_cache=False).logits
    return logits
