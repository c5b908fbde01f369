# SPDX-License-Identifier: Apache-2.0
"""Coded checkpoints as transformers models: offsets change nothing, rounding is the kernels'."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.calibration.coded import RANKS, coded_maps, coded_ranks, write_coded
from tests.calibration.tiny import build_model, save_model
from vllm_eigen.calibration.export.write import eigen_config, write_checkpoint
from vllm_eigen.calibration.finetuning.finetune import finetune
from vllm_eigen.calibration.methods.basis import LayerMaps
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.calibration.model.hooks import coded_cache, compress_layer
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.checkpoint.families import family_of
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import UsageError

SIZES = {"head_dim": 32, "hidden_size": 48}
VARIANTS: list[tuple[str, dict[str, Any], KeyMode | None]] = [
    ("llama", SIZES, KeyMode.PRE_ROPE),
    ("llama", SIZES, KeyMode.POST_ROPE),
    ("llama", {**SIZES, "attention_bias": True}, KeyMode.PRE_ROPE),
    ("qwen2", {"hidden_size": 128}, KeyMode.PRE_ROPE),
    ("qwen2", {"hidden_size": 128}, KeyMode.POST_ROPE),
    ("qwen3", SIZES, KeyMode.PRE_ROPE),
    ("qwen3", SIZES, KeyMode.POST_ROPE),
    ("opt", {"hidden_size": 128, "word_embed_proj_dim": 128}, None),
    ("opt", {"hidden_size": 128, "word_embed_proj_dim": 128, "enable_bias": False}, None),
    ("mpt", {"d_model": 128}, None),
    ("mpt", {"d_model": 128, "attn_config": {"clip_qkv": 0.8}}, None),
]


def hooked_logits(
    base: Path,
    maps: Sequence[LayerMaps],
    ranks: Sequence[LayerRanks],
    key_mode: KeyMode,
    tokens: torch.Tensor,
    *,
    coded: bool,
) -> torch.Tensor:
    """The base model with its keys and values passed through the maps, in float64."""
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM
    model = build.from_pretrained(base, dtype=torch.float64)
    family = family_of(model.config.to_dict() | {"architectures": [type(model).__name__]})
    geometry = family.geometry(model.config.to_dict())
    with contextlib.ExitStack() as stack:
        for index, (item, rank) in enumerate(zip(maps, ranks, strict=True)):
            layer = model.get_submodule(f"{family.decoder}.{family.layers}.{index}")
            cache = coded_cache(rank) if coded else None
            stack.enter_context(compress_layer(layer, family, geometry, key_mode, item, cache))
        with torch.no_grad():
            logits: torch.Tensor = model(tokens).logits
    return logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("kind", "changes", "key_mode"), VARIANTS)
def test_written_checkpoint_is_the_hooked_base_model(
    kind: str, changes: dict[str, Any], key_mode: KeyMode | None, tmp_path: Path
) -> None:
    base = save_model(build_model(kind, **changes), tmp_path / "base")
    key_mode = key_mode or KeyMode.NO_ROPE
    maps = write_coded(base, tmp_path / "eigen", RANKS, key_mode)
    assert validate(tmp_path / "eigen").key_offset
    tokens = torch.randint(3, 60, (2, 24))
    with torch.no_grad():
        smooth = load_reference(tmp_path / "eigen", cache=lambda _: lambda _, latents: latents)
        got = smooth.double()(tokens).logits
        rounded = load_reference(tmp_path / "eigen").double()(tokens).logits
    expected = hooked_logits(base, maps, RANKS, key_mode, tokens, coded=False)
    assert relative(got, expected) < 1e-5
    # Stored in float32: a latent next to the border of two codes may get the other one.
    coded = hooked_logits(base, maps, RANKS, key_mode, tokens, coded=True)
    assert relative(rounded, coded) < 1e-3
    assert relative(rounded, expected) > 5e-3, "nothing was rounded"


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen3"])
def test_offsets_are_nothing_at_full_rank(kind: str, tmp_path: Path) -> None:
    """(k - o) E D + o = k, wherever the offsets went, and so the base model's logits."""
    changes = {"hidden_size": 128, "word_embed_proj_dim": 128} if kind == "opt" else SIZES
    model = build_model(kind, **changes)
    base = save_model(model, tmp_path / "base")
    full = [coded_ranks(Code(eight=32), Code(eight=32))] * 2
    tokens = torch.randint(3, 60, (2, 24))
    with torch.no_grad():
        exact = model.double()(tokens).logits
    for mode in open_source(str(base)).family.key_modes:
        write_coded(base, tmp_path / mode, full, mode)
        with torch.no_grad():
            smooth = load_reference(tmp_path / mode, cache=lambda _: lambda _, latents: latents)
            assert relative(smooth.double()(tokens).logits, exact) < 1e-5


def test_groups_of_heads_share_codes(tmp_path: Path) -> None:
    base = save_model(build_model("llama", **SIZES), tmp_path / "base")
    ranks = [coded_ranks(Code(eight=8, four=32), Code(four=48, token_scale=True))] * 2
    maps = write_coded(base, tmp_path / "eigen", ranks, head_group=2)
    tokens = torch.randint(3, 60, (2, 24))
    with torch.no_grad():
        rounded = load_reference(tmp_path / "eigen").double()(tokens).logits
    expected = hooked_logits(base, maps, ranks, KeyMode.PRE_ROPE, tokens, coded=True)
    assert relative(rounded, expected) < 1e-3


def test_stored_tensors_by_hand(tmp_path: Path) -> None:
    base = save_model(build_model("llama", **SIZES), tmp_path / "base")
    maps = write_coded(base, tmp_path / "eigen", RANKS)[0]
    stored = {
        name: item.double()
        for name, item in load_file(tmp_path / "eigen" / "model.safetensors").items()
    }
    original = load_file(base / "model.safetensors")
    path = "model.layers.0.self_attn"
    assert maps.key_offset is not None
    assert maps.value_offset is not None
    for head in range(2):
        rows = slice(28 * head, 28 * head + 28)
        bias = -maps.key_offset[head] @ maps.key[0][head]
        torch.testing.assert_close(stored[f"{path}.k_proj.bias"][rows], bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stored[f"{path}.key_offset"], maps.key_offset, rtol=1e-6, atol=1e-6)
    out = original[f"{path}.o_proj.weight"].double().view(48, 4, 32)
    back = sum(out[:, head] @ maps.value_offset[head // 2] for head in range(4))
    torch.testing.assert_close(stored[f"{path}.o_proj.bias"], back, rtol=1e-5, atol=1e-5)


def test_an_offset_must_be_announced(tmp_path: Path) -> None:
    source = open_source(str(save_model(build_model("llama", **SIZES), tmp_path / "base")))
    maps = coded_maps(source, RANKS, KeyMode.PRE_ROPE)
    options: dict[str, Any] = {"key_mode": KeyMode.PRE_ROPE, "method": "x", "head_group": 1}
    eigen = eigen_config(source, RANKS, provenance={}, value_offset=True, **options)
    with pytest.raises(ValueError, match="key_offset"):
        write_checkpoint(source, eigen, maps, tmp_path / "eigen")
    without = [replace(maps[0], value_offset=None, key_offset=None), *maps[1:]]
    eigen = eigen_config(
        source, RANKS, provenance={}, key_offset=True, value_offset=True, **options
    )
    write_checkpoint(source, eigen, without, tmp_path / "eigen")
    stored = load_file(tmp_path / "eigen" / "model.safetensors")
    assert not stored["model.layers.0.self_attn.key_offset"].any()


def test_coded_checkpoints_are_not_trained(tmp_path: Path) -> None:
    base = save_model(build_model("llama", **SIZES), tmp_path / "base")
    write_coded(base, tmp_path / "eigen", RANKS)
    unused: Any = None
    rest = dict.fromkeys(("length", "provenance", "reporter"), unused)
    with pytest.raises(UsageError, match="fine-tune a checkpoint of 16-bit latents"):
        finetune(
            tmp_path / "eigen", unused, tmp_path / "out", unused, device=torch.device("cpu"), **rest
        )
