# SPDX-License-Identifier: Apache-2.0
"""The plain PyTorch model of a checkpoint: tensors read and written back, hooks put on and off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.calibration.model.test_fold import folded, random_bases
from tests.calibration.tiny import build_model, save_model
from vllm_eigen.calibration.model.compressed import CompressedModel, load_reference
from vllm_eigen.calibration.model.hooks import compress
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.checkpoint.modes import KeyMode

CASES: list[tuple[str, int, KeyMode | None, dict[str, Any]]] = [
    ("llama", 1, KeyMode.PRE_ROPE, {"attention_bias": True}),
    ("llama", 2, KeyMode.PRE_ROPE, {}),
    ("llama", 1, KeyMode.POST_ROPE, {}),
    ("qwen3", 2, KeyMode.PRE_ROPE, {}),
    ("opt", 1, None, {}),
    ("opt", 2, None, {"enable_bias": False}),
    ("mpt", 1, None, {}),
    ("mpt", 1, None, {"attn_config": {"clip_qkv": 0.8}}),
]


@pytest.mark.parametrize(("kind", "group", "key_mode", "changes"), CASES, ids=str)
def test_what_is_read_is_written_back(
    kind: str, group: int, key_mode: KeyMode | None, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = save_model(build_model(kind, **changes), tmp_path / "base")
    # The first layer's ranks exceed the head size where heads are grouped.
    ranks = [(8 * group - 3, 8 * group - 2), (3, 5)]
    output, _ = folded(base, tmp_path / "eigen", ranks, group, key_mode=key_mode)
    stored = load_file(output / "model.safetensors")
    tensors = CompressedModel(output).tensors()
    prefix = "" if set(tensors) <= set(stored) else "model."
    assert tensors
    for name, tensor in tensors.items():
        expected = stored[name.removeprefix(prefix)].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


def test_cache_sees_the_latents(tmp_path: Path) -> None:
    base = save_model(build_model("llama"), tmp_path / "base")
    output, _ = folded(base, tmp_path / "eigen", [(3, 5), (7, 2)])
    seen: list[tuple[str, int]] = []

    def cache(ranks: Any) -> Any:
        def read_back(part: str, latents: torch.Tensor) -> torch.Tensor:
            seen.append((part, latents.shape[-1]))
            return torch.zeros_like(latents)

        return read_back

    tokens = torch.randint(3, 60, (1, 12))
    with torch.no_grad():
        found = load_reference(output, cache=cache)(tokens).logits
        exact = load_reference(output)(tokens).logits
    assert seen == [("key", 3), ("value", 5), ("key", 7), ("value", 2)]
    assert not torch.allclose(found, exact)


@pytest.mark.parametrize("changes", [{}, {"attn_config": {"clip_qkv": 0.8}}], ids=str)
def test_hooks_go_when_the_context_is_left(changes: dict[str, Any], tmp_path: Path) -> None:
    model = build_model("mpt", **changes)
    source = open_source(str(save_model(model, tmp_path)))
    tokens = torch.randint(3, 60, (1, 12))
    maps = random_bases(4, 8, seed=0).at(3)
    logits = []
    with torch.no_grad():
        logits.append(model(tokens).logits)
        layer = model.transformer.blocks[0]
        with compress(layer, source.family, source.geometry, KeyMode.NO_ROPE, maps, maps):
            logits.append(model(tokens).logits)
        logits.append(model(tokens).logits)
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[1])
