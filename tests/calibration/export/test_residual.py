# SPDX-License-Identifier: Apache-2.0
"""Which models may be refitted: real layers of transformers, plain and not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.tiny import MAKERS, build_model, save_model
from vllm_eigen.calibration.export.residual import check_plain_residual
from vllm_eigen.calibration.job import Job, Recipe
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.state import State
from vllm_eigen.common.errors import UsageError
from vllm_eigen.common.progress import Reporter

NOT_PLAIN = ("gemma2", "gemma3_text", "glm4", "granite", "olmo2")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in sorted(set(MAKERS) - set(NOT_PLAIN))),
    ("opt", {"do_layer_norm_before": False}),
    ("granite", {"residual_multiplier": 1.0}),
]


def _job(folder: Path) -> Job:
    source = open_source(str(folder))
    model = LayerwiseModel(source, torch.device("cpu"), eager=False)
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    return Job(model, Recipe.resolve(source, "sensitivity"), tokens, State(), Reporter(quiet=True))


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=str)
def test_plain_residuals_pass(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    check_plain_residual(_job(save_model(build_model(kind, **changes), tmp_path)))


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_others_are_refused_before_the_work(
    kind: str,
    tmp_path: Path,
    text_file: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    folder = save_model(build_model(kind), tmp_path / "model")
    with pytest.raises(UsageError, match="--no-refit"):
        check_plain_residual(_job(folder))
    options = ("--kv-ratio", 0.5, "--text", text_file, "--samples", 12, "--seq-len", 24)
    options = (*options, "--method", "sensitivity")
    output = ("--output", tmp_path / "out")
    status, _, error = command("calibrate", folder, *output, *options)
    assert status == 2
    assert "--no-refit" in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()
