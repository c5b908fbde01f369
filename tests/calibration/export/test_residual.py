# SPDX-License-Identifier: Apache-2.0
"""Which models may be refitted: real layers of transformers, plain and not."""

from __future__ import annotations

import json
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

CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in sorted(set(MAKERS) - {"gemma3_text"})),
    ("opt", {"do_layer_norm_before": False}),
    ("llama", {"model_type": "granite", "residual_multiplier": 1.0}),
]
OTHERS: list[dict[str, Any]] = [
    {"model_type": "granite", "residual_multiplier": 0.5},
    {"model_type": "olmo2"},
]


def _job(folder: Path) -> Job:
    source = open_source(str(folder))
    model = LayerwiseModel(source, torch.device("cpu"), eager=False)
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    return Job(model, Recipe.resolve(source, "sensitivity"), tokens, State(), Reporter(quiet=True))


def _as_llama(folder: Path, changes: dict[str, Any]) -> Path:
    """A model whose layers have the module names of Llama, described as one."""
    folder = save_model(build_model("llama", **changes), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=str)
def test_plain_residuals_pass(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    if "model_type" in changes:
        folder = _as_llama(tmp_path, changes)
    else:
        folder = save_model(build_model(kind, **changes), tmp_path)
    check_plain_residual(_job(folder))


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_others_are_refused_before_the_work(
    changes: dict[str, Any],
    tmp_path: Path,
    text_file: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    folder = _as_llama(tmp_path / "model", changes)
    with pytest.raises(UsageError, match="--no-refit"):
        check_plain_residual(_job(folder))
    mixed = save_model(build_model("gemma3_text"), tmp_path / "mixed")
    with pytest.raises(UsageError, match="--no-refit"):
        check_plain_residual(_job(mixed))
    options = ("--kv-ratio", 0.5, "--text", text_file, "--samples", 12, "--seq-len", 24)
    options = (*options, "--method", "sensitivity")
    output = ("--output", tmp_path / "out")
    status, _, error = command("calibrate", folder, *output, *options)
    assert status == 2
    assert "--no-refit" in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()
