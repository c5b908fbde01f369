# SPDX-License-Identifier: Apache-2.0
"""Coded layers and offsets in the format: bytes, tensors, and damage named in one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.checkpoint.test_config import HIDDEN, make_config
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.checkpoint.config import LayerRanks, check_cache_dtype, parse_config
from vllm_eigen.checkpoint.families import family_of
from vllm_eigen.checkpoint.shapes import tensor_shapes
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import CheckpointError, UsageError

HEAD_SIZE = 32
LAYERS = [
    {
        "rank_k": 28,
        "rank_v": 24,
        "key_code": {"eight": 4, "four": 8, "two": 16},
        "value_code": {"four": 24, "token_scale": True},
    },
    {
        "rank_k": 12,
        "rank_v": 32,
        "key_code": {"eight": 12, "token_scale": True, "scale_floor": 1.0},
        "value_code": {"four": 32, "token_scale": True},
    },
]
BYTES = 2 * ((4 + 4 + 4 + 12 + 2) + (12 + 2 + 16 + 2))
"""Of a token, over both layers and two KV heads."""


def coded_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A `config.json` of coded layers with offsets; `changes` are of its eigen section."""
    config = make_config(architecture)
    config["head_dim"] = HEAD_SIZE
    config["eigen"] |= {
        "head_size": HEAD_SIZE,
        "layers": json.loads(json.dumps(LAYERS)),
        "key_offset": True,
        "value_offset": True,
        **changes,
    }
    return config


def write(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of zeros."""
    eigen = parse_config(config)
    shapes = tensor_shapes(eigen, family_of(config), HIDDEN)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in shapes}, folder / "model.safetensors"
    )


def test_bytes_and_ratio() -> None:
    eigen = parse_config(coded_config())
    assert eigen.bytes_per_token(2) == eigen.bytes_per_token(4) == BYTES
    assert eigen.uncompressed_bytes_per_token(2) == 2 * 2 * HEAD_SIZE * 2 * 2
    assert eigen.kv_ratio == pytest.approx(BYTES / (2 * 2 * HEAD_SIZE * 2 * 2))


@given(
    eight=st.integers(0, 8),
    four=st.integers(0, 8),
    two=st.integers(1, 4),
    token_scale=st.booleans(),
)
def test_any_code_counts_its_bytes(eight: int, four: int, two: int, token_scale: bool) -> None:
    token_scale = token_scale and eight + four > 0
    code = Code(eight=4 * eight, four=8 * four, two=16 * two, token_scale=token_scale)
    plain = Code(four=8)
    layer = LayerRanks(rank_k=code.rank, rank_v=8, key_code=code, value_code=plain)
    bits = sum(width * count for width, count in code.counts()) + 16 * token_scale
    assert 8 * layer.num_bytes(4) == bits + 32
    assert code.bits == bits / code.rank
    assert LayerRanks.model_validate(json.loads(layer.model_dump_json())) == layer


def test_projections_that_hold_offsets_have_biases() -> None:
    config = coded_config()
    shapes = dict(tensor_shapes(parse_config(config), family_of(config), HIDDEN))
    path = "model.layers.1.self_attn"
    assert shapes[f"{path}.k_proj.bias"] == (2 * 12,)
    assert shapes[f"{path}.v_proj.bias"] == (2 * 32,)
    assert shapes[f"{path}.o_proj.bias"] == (HIDDEN,)
    assert shapes[f"{path}.key_offset"] == (2, HEAD_SIZE)
    assert not any("q_proj.bias" in name or "encoder" in name for name in shapes)


@pytest.mark.parametrize(
    ("projections", "key_mode", "beside"),
    [
        ("values-folded", "post-rope", {"key_encoder", "key_basis", "key_encoder_bias"}),
        (
            "untouched",
            "pre-rope",
            {"key_encoder", "key_basis", "key_encoder_bias", "key_offset"}
            | {"value_encoder", "value_basis", "value_encoder_bias", "value_offset"},
        ),
    ],
)
def test_offsets_beside_the_projections(projections: str, key_mode: str, beside: set[str]) -> None:
    config = coded_config(projections=projections, key_mode=key_mode)
    shapes = dict(tensor_shapes(parse_config(config), family_of(config), HIDDEN))
    found = {name.rsplit(".", 1)[1] for name in shapes if ".layers.0." in name}
    assert found - {"weight", "bias"} == beside
    biases = {name.split(".")[-2] for name in shapes if name.endswith(".bias")}
    assert biases == ({"v_proj", "o_proj"} if projections == "values-folded" else set())


def test_written_checkpoint_is_valid(tmp_path: Path) -> None:
    write(tmp_path, coded_config())
    assert validate(tmp_path).layers[0].key_code == Code(eight=4, four=8, two=16)


def test_another_element_type_is_refused() -> None:
    eigen = parse_config(coded_config())
    check_cache_dtype(eigen, "auto")
    with pytest.raises(UsageError, match="coded latents"):
        check_cache_dtype(eigen, "fp8")


Damage = Callable[[dict[str, Any]], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "counts off the unit": (lambda x: x["key_code"].update(eight=3), "do not fill units"),
    "count negative": (lambda x: x["key_code"].update(two=-16), "two"),
    "count no number": (lambda x: x["key_code"].update(two="many"), "two"),
    "no directions": (lambda x: x.update(value_code={}), "at least one direction"),
    "unknown width": (lambda x: x["key_code"].update(three=8), "three"),
    "rank not the code's": (lambda x: x.update(rank_k=24), "rank_k is 24, its code has 28"),
    "one code": (lambda x: x.pop("value_code"), "go together"),
    "not coded": (lambda x: [x.pop("value_code"), x.pop("key_code")], "all layers are coded"),
    "floor not finite": (lambda x: x["key_code"].update(scale_floor=float("nan")), "scale_floor"),
    "floor negative": (lambda x: x["key_code"].update(scale_floor=-1.0), "scale_floor"),
    "fp8 scale not finite": (lambda x: x.update(k_scale=float("nan")), "k_scale"),
    "fp8 scale zero": (lambda x: x.update(v_scale=0.0), "v_scale"),
    "more than the head": (
        lambda x: x.update(rank_v=40, value_code={"four": 40}),
        r"ranks \(28, 40\) exceed",
    ),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_edited_layer_is_refused(tmp_path: Path, damage: str) -> None:
    edit, message = DAMAGES[damage]
    config = coded_config()
    write(tmp_path, config)
    edit(config["eigen"]["layers"][0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        validate(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["key_offset", "value_offset"])
def test_offset_without_its_tensors_is_refused(tmp_path: Path, flag: str) -> None:
    config = coded_config(**{flag: False})
    write(tmp_path, config)
    config["eigen"][flag] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"_proj\.bias is missing"):
        validate(tmp_path)


@given(data=st.data())
def test_fuzzed_layers_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever stands in the section, it is read or refused; and only what fits its tensors."""
    folder = tmp_path_factory.mktemp("fuzzed")
    config = coded_config()
    write(folder, config)
    layer = config["eigen"]["layers"][data.draw(st.integers(0, 1))]
    part = data.draw(st.sampled_from(["key_code", "value_code", ""]))
    place = layer[part] if part else layer
    name = data.draw(
        st.sampled_from(sorted([*place, "eight", "four", "two", "scale_floor", "rank_k"]))
    )
    numbers = st.integers(-64, 64) | st.floats() | st.sampled_from([10**9, 1 << 70])
    place[name] = data.draw(numbers | st.none() | st.text(max_size=3) | st.booleans())
    (folder / "config.json").write_text(json.dumps(config))
    try:
        eigen = validate(folder)
    except CheckpointError as error:
        refusal = str(error)
        assert "\n" not in refusal
        return
    for found, written in zip(eigen.layers, LAYERS, strict=True):
        assert (found.rank_k, found.rank_v) == (written["rank_k"], written["rank_v"])
        assert found.coded


@pytest.mark.parametrize("name", ["key_basis", "key_offset", "k_proj.bias", "o_proj.bias"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_numbers_that_are_none_are_refused(
    tmp_path: Path, name: str, number: float, dtype: str
) -> None:
    write(tmp_path, coded_config())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    full = next(key for key in tensors if key.endswith(name))
    as_type = {"F64": np.float64, "F16": np.float16}.get(dtype, np.float32)
    tensors[full] = np.full(tensors[full].shape, 7.0, as_type)
    save_file(tensors, path)
    if dtype == "BF16":
        to_bfloat16(path, full)
    validate(tmp_path)
    set_last(path, full, number)
    with pytest.raises(CheckpointError, match=f"{name}.*not finite") as caught:
        validate(tmp_path)
    assert "\n" not in str(caught.value)


def set_last(path: Path, name: str, number: float) -> None:
    """Overwrite a stored tensor's last element."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + size])[name]
    form = {"F64": "<d", "F32": "<f", "F16": "<e"}.get(entry["dtype"])
    bits = struct.pack(form, number) if form else struct.pack("<f", number)[2:]
    end = 8 + size + entry["data_offsets"][1]
    data[end - len(bits) : end] = bits
    path.write_bytes(bytes(data))


def to_bfloat16(path: Path, name: str) -> None:
    """Store a float32 tensor as bfloat16, which numpy does not have."""
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    tensors = load(path)
    tensors[name] = tensors[name].to(torch.bfloat16)
    save(tensors, path)


@given(kept=st.floats(0, 0.999))
def test_truncated_coded_checkpoint_is_refused(
    tmp_path_factory: pytest.TempPathFactory, kept: float
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    write(folder, coded_config())
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or damaged"):
        validate(folder)
