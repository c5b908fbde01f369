# SPDX-License-Identifier: Apache-2.0
"""The probe's trials: where their hidden states are kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_eigen.calibration.allocation.probe import probe
from vllm_eigen.calibration.job import Job, Recipe
from vllm_eigen.calibration.layer_pass import run_layers
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.state import State
from vllm_eigen.common.progress import Reporter


def test_trials_past_the_jobs_limit_are_mapped_in_its_state_folder(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(make_model("llama")))
    model = LayerwiseModel(source, torch.device("cpu"))
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    recipe, reporter = Recipe.resolve(source, "sensitivity"), Reporter(quiet=True)
    in_memory = Job(model, recipe, tokens, State(), reporter)
    bases = [layer.bases for layer in run_layers(in_memory, None)]
    expected = probe(in_memory, tokens, bases)

    mapped: list[tuple[Path, int]] = []
    from_file = torch.from_file

    def record(name: str, *, size: int, **options: Any) -> torch.Tensor:
        mapped.append((Path(name).parent, size))
        return from_file(name, size=size, **options)

    monkeypatch.setattr(torch, "from_file", record)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not-here"))
    folder = tmp_path / "state"
    window = tokens.numel() * source.geometry.hidden_size
    # One set of hidden states fits, those of all trials do not.
    limited = Job(model, recipe, tokens, State(folder), reporter, memory_limit=4 * window)
    assert probe(limited, tokens, bases) == expected
    # Two layers, keys and values, three ranks each.
    assert mapped == [(folder, 12 * window)]
    assert not list(folder.glob("activations.*"))
