# SPDX-License-Identifier: Apache-2.0
"""The dry run on configurations of models that people run, of every family."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.model.transformers_model import auto_config, auto_model
from vllm_eigen.checkpoint.estimate import element_bytes, estimate
from vllm_eigen.checkpoint.families import FAMILIES

MODELS: dict[str, Any] = json.loads(
    Path(__file__).with_name("real_models.json").read_text(encoding="utf-8")
)
"""By hub id: billions of parameters as published, and what of `config.json` matters here."""


@pytest.mark.parametrize("name", sorted(MODELS))
def test_dry_run(name: str, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    config, billions = MODELS[name]["config"], MODELS[name]["billions"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = open_source(str(tmp_path), with_weights=False)
    with torch.device("meta"):
        model = auto_model(auto_config(source), eager=False)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)
    weights = estimate(config, 1 << 40).uncompressed.weight_bytes
    element = element_bytes(config["torch_dtype"])
    assert weights / element / 1e9 == pytest.approx(billions, rel=5e-3)
    arguments = ("--output", tmp_path / "out", "--kv-ratio", 0.27, "--dry-run")
    status, printed, error = command("calibrate", tmp_path, *arguments)
    assert status == 0, error
    ratio = float(re.findall(r"KV ratio +(\S+)", printed)[0])
    assert 0.25 < ratio <= 0.27
    bytes_per_token = re.findall(r"bytes a token +([\d,]+) of ([\d,]+)", printed)[0]
    kept, whole = (int(number.replace(",", "")) for number in bytes_per_token)
    layers = len(source.family.compressed_layers(config))
    assert whole == 4 * layers * source.geometry.num_kv_heads * source.geometry.head_size
    assert kept / whole == pytest.approx(ratio, abs=1e-4)


def test_every_family_is_there() -> None:
    named = {name for facts in MODELS.values() for name in facts["config"]["architectures"]}
    assert all(named & {family.architecture, *family.aliases} for family in FAMILIES)
