# SPDX-License-Identifier: Apache-2.0
"""The format: what is written is read, and every kind of damage is named in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from vllm_eigen.checkpoint.config import FORMAT_VERSION, parse_config
from vllm_eigen.checkpoint.families import FAMILIES, family_of
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.checkpoint.shapes import tensor_shapes
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import CheckpointError, UnsupportedModelError

HIDDEN = 24
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"num_key_value_heads": 2},
    "OPTForCausalLM": {},
}


def make_config(architecture: str) -> dict[str, Any]:
    """A `config.json` of two layers, not coded."""
    family = next(family for family in FAMILIES if family.architecture == architecture)
    num_kv_heads = CONFIGS[architecture].get("num_key_value_heads", 4)
    return {
        "model_type": family.model_type,
        "architectures": [family.eigen_architecture],
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "eigen": {
            "format_version": FORMAT_VERSION,
            "key_mode": family.key_modes[0],
            "method": "paper",
            "num_heads": 4,
            "num_kv_heads": num_kv_heads,
            "head_size": 6,
            "layers": [{"rank_k": 3, "rank_v": 5}, {"rank_k": 6, "rank_v": 1}],
            "provenance": {},
        },
        **CONFIGS[architecture],
    }


def _write(folder: Path, architecture: str) -> None:
    config = make_config(architecture)
    eigen = parse_config(config)
    shapes = tensor_shapes(eigen, family_of(config), HIDDEN)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(params=sorted(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    _write(tmp_path, request.param)
    return tmp_path


def test_valid_checkpoint_reads_back(folder: Path) -> None:
    eigen = validate(folder)
    assert [(layer.rank_k, layer.rank_v) for layer in eigen.layers] == [(3, 5), (6, 1)]
    assert eigen.kv_ratio == pytest.approx(15 / 24)


def test_version_1_is_read() -> None:
    config = make_config("OPTForCausalLM")
    config["eigen"].update(format_version=1, key_mode="folded")
    assert parse_config(config).key_mode is KeyMode.NO_ROPE


Damage = Callable[[dict[str, Any]], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no section": (lambda c: c.pop("eigen"), "no 'eigen' section"),
    "unknown version": (lambda c: c["eigen"].update(format_version=99), "version 99"),
    "wrong rank": (lambda c: c["eigen"]["layers"][1].update(rank_v=2), "has shape"),
    "rank too large": (lambda c: c["eigen"]["layers"][0].update(rank_k=7), "exceed"),
    "rank zero": (lambda c: c["eigen"]["layers"][0].update(rank_k=0), r"layers\.0\.rank_k"),
    "rank no number": (lambda c: c["eigen"]["layers"][0].update(rank_k="x"), "rank_k"),
    "layer missing": (lambda c: c["eigen"]["layers"].pop(), "number of layers"),
    "other head size": (lambda c: c["eigen"].update(head_size=8), "head_size"),
    "unknown field": (lambda c: c["eigen"].update(surprise=1), "surprise"),
    "unknown mode": (lambda c: c["eigen"].update(key_mode="magic"), "key_mode"),
    "folded through a rotation": (
        lambda c: c["eigen"].update(projections="folded", key_mode="post-rope"),
        "projections 'folded' cannot be|key mode post-rope does not fit",
    ),
    "bad group": (lambda c: c["eigen"].update(head_group=3), "head_group 3"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_edited_config_is_refused(folder: Path, damage: str) -> None:
    edit, message = DAMAGES[damage]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        validate(folder)
    assert "\n" not in str(caught.value)


def test_missing_tensor_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "v_proj" in name)
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=name):
        validate(folder)


@given(kept=st.floats(0, 0.999))
def test_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, kept: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    _write(folder, "LlamaForCausalLM")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or damaged"):
        validate(folder)


def test_missing_weights_and_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        validate(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        validate(folder)
    with pytest.raises(CheckpointError, match="cannot read"):
        validate(folder / "nowhere")


def test_unsupported_architecture_lists_the_supported() -> None:
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        family_of({"architectures": ["MambaForCausalLM"]})
