# SPDX-License-Identifier: Apache-2.0
"""Folding and unfolding against the base model and against low-rank attention done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.calibration.tiny import build_model, save_model
from vllm_eigen.calibration.export.write import eigen_config, write_checkpoint
from vllm_eigen.calibration.methods.basis import Basis, LayerBases, tail_loss
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.calibration.model.hooks import compress
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.checkpoint.validate import validate

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 12}),
    ("opt", {}),
    ("opt", {"do_layer_norm_before": False, "tie_word_embeddings": True}),
    ("opt", {"enable_bias": False}),
    ("opt", {"word_embed_proj_dim": 16}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("gemma3_text", {}),
    ("gemma3_text", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("mpt", {}),
    ("mpt", {"n_heads": 2, "tie_word_embeddings": True}),
    ("mpt", {"attn_config": {"clip_qkv": 0.8}}),
    ("mpt", {"attn_config": {"softmax_scale": 0.5}}),
]


class Unrounded(Basis):
    """A basis that is truncated even at full rank, to test the algebra of folding there too."""

    def at(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder[:, :, :rank], self.decoder[:, :rank, :]


def random_bases(heads: int, size: int, seed: int) -> Basis:
    """Oblique maps: a random encoder, its inverse as the decoder."""
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(size, dtype=torch.float64)
    noise = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
    encoder = eye + 0.3 * noise / size**0.5
    energy = torch.ones(heads, size, dtype=torch.float64)
    return Unrounded(encoder, torch.linalg.inv(encoder), energy, tail_loss(energy))


def folded(
    folder: Path,
    output: Path,
    ranks: list[tuple[int, int]],
    group: int = 1,
    seed: int = 0,
    key_mode: KeyMode | None = None,
) -> tuple[Path, list[LayerBases]]:
    """Write a checkpoint with random bases."""
    source = open_source(str(folder))
    geometry = source.geometry
    heads, size = geometry.num_kv_heads // group, geometry.head_size * group
    bases = [
        LayerBases(
            random_bases(heads, size, seed + 2 * n), random_bases(heads, size, seed + 2 * n + 1)
        )
        for n in range(len(ranks))
    ]
    layers = [LayerRanks(rank_k=rank_k, rank_v=rank_v) for rank_k, rank_v in ranks]
    eigen = eigen_config(
        source,
        layers,
        key_mode=key_mode or source.family.key_modes[0],
        method="random",
        head_group=group,
        provenance={},
    )
    write_checkpoint(source, eigen, bases, output)
    return output, bases


def compressed_logits(
    model: Any, folder: Path, bases: list[LayerBases], output: Path, tokens: torch.Tensor
) -> torch.Tensor:
    """The base model with its keys and values passed through the maps, in float64."""
    import contextlib

    source, eigen = open_source(str(folder)), validate(output)
    family = source.family
    model = model.double()
    with contextlib.ExitStack() as stack:
        for index, item, ranks in zip(eigen.layer_indices, bases, eigen.layers, strict=True):
            layer = model.get_submodule(f"{family.decoder}.{family.layers}.{index}")
            maps = item.key.at(ranks.rank_k), item.value.at(ranks.rank_v)
            stack.enter_context(compress(layer, family, source.geometry, eigen.key_mode, *maps))
        with torch.no_grad():
            logits: torch.Tensor = model(tokens).logits
    return logits


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_full_rank_is_lossless(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(kind, **changes)
    base = save_model(model, tmp_path / "base")
    source = open_source(str(base))
    size = source.geometry.head_size
    output, _ = folded(base, tmp_path / "eigen", [(size, size)] * 2)
    tokens = torch.randint(3, 60, (2, 24))
    with torch.no_grad():
        expected = model.double()(tokens).logits
        got = load_reference(output).double()(tokens).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_unfolded_model_equals_low_rank_attention(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = build_model(kind, **changes)
    base = save_model(model, tmp_path / "base")
    output, bases = folded(base, tmp_path / "eigen", [(3, 5), (7, 2)])
    tokens = torch.randint(3, 60, (2, 24))
    expected = compressed_logits(model, base, bases, output, tokens)
    with torch.no_grad():
        got = load_reference(output).double()(tokens).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("ranks", [[(8, 8)] * 2, [(3, 5), (7, 2)]])
def test_keys_cached_after_rotation(
    kind: str, ranks: list[tuple[int, int]], tmp_path: Path
) -> None:
    model = build_model(kind)
    base = save_model(model, tmp_path / "base")
    output, bases = folded(base, tmp_path / "eigen", ranks, key_mode=KeyMode.POST_ROPE)
    assert validate(output).projections == "values-folded"
    tokens = torch.randint(3, 60, (2, 24))
    with torch.no_grad():
        exact = model.double()(tokens).logits
        got = load_reference(output).double()(tokens).logits
    expected = compressed_logits(model, base, bases, output, tokens)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    if ranks[0] == (8, 8):
        assert float((got - exact).abs().max() / exact.abs().max()) < 1e-5


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["llama", "qwen3", "opt"]),
    heads=st.sampled_from([(2, 1, 1), (4, 2, 2), (4, 4, 2), (4, 4, 4), (6, 3, 3)]),
    size=st.sampled_from([4, 6, 8]),
    data=st.data(),
)
def test_groups_of_heads_fold_and_unfold(
    kind: str,
    heads: tuple[int, int, int],
    size: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    num_heads, kv_heads, group = heads
    changes: dict[str, Any] = {"num_attention_heads": num_heads}
    key_mode = None
    if kind == "opt":
        kv_heads = num_heads
        width = num_heads * size
        changes |= {"hidden_size": width, "word_embed_proj_dim": width}
        if kv_heads % group:
            return
    else:
        changes |= {"num_key_value_heads": kv_heads, "head_dim": size, "hidden_size": 24}
        key_mode = data.draw(st.sampled_from([KeyMode.PRE_ROPE, KeyMode.POST_ROPE]))
    full = size * group
    rank = st.integers(1, full)
    ranks = [(data.draw(rank), data.draw(rank)) for _ in range(2)]
    folder = tmp_path_factory.mktemp("group")
    model = build_model(kind, **changes)
    base = save_model(model, folder / "base")
    output, bases = folded(base, folder / "eigen", ranks, group, key_mode=key_mode)
    tokens = torch.randint(3, 60, (1, 12))
    expected = compressed_logits(model, base, bases, output, tokens)
    with torch.no_grad():
        got = load_reference(output).double()(tokens).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4


def test_low_rank_attention_by_hand(tmp_path: Path) -> None:
    """One OPT layer's stored tensors against attention written out with k' = k E, k_hat = k' D."""
    from safetensors.torch import load_file

    model = build_model("opt")
    base = save_model(model, tmp_path / "base")
    output, bases = folded(base, tmp_path / "eigen", [(3, 5), (7, 2)])
    stored = {name: item.double() for name, item in load_file(output / "model.safetensors").items()}
    attention = model.model.decoder.layers[0].self_attn.double()
    h = torch.randn(9, 32, dtype=torch.float64)
    (key_in, key_out), (value_in, value_out) = bases[0].key.at(3), bases[0].value.at(5)
    mask = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)
    with torch.no_grad():
        q, k, v = (
            getattr(attention, name)(h).view(9, 4, 8) for name in ("q_proj", "k_proj", "v_proj")
        )
        by_hand = torch.zeros(9, 32, dtype=torch.float64)
        for head in range(4):
            k_hat = k[:, head] @ key_in[head] @ key_out[head]
            v_hat = v[:, head] @ value_in[head] @ value_out[head]
            probabilities = torch.softmax(q[:, head] @ k_hat.T / 8**0.5 + mask, -1)
            columns = attention.out_proj.weight[:, 8 * head : 8 * head + 8]
            by_hand += probabilities @ v_hat @ columns.T
    prefix = "model.decoder.layers.0.self_attn."
    prefix = prefix if f"{prefix}q_proj.weight" in stored else prefix.removeprefix("model.")

    def linear(name: str) -> torch.Tensor:
        return h @ stored[f"{prefix}{name}.weight"].T + stored[f"{prefix}{name}.bias"]

    q, k, v = (linear(name).view(9, 4, -1) for name in ("q_proj", "k_proj", "v_proj"))
    assert (q.shape[-1], k.shape[-1], v.shape[-1]) == (3, 3, 5)
    scores = torch.einsum("ihr,jhr->hij", q, k) / 8**0.5 + mask
    context = torch.einsum("hij,jhr->ihr", torch.softmax(scores, -1), v).flatten(1)
    folded_out = context @ stored[f"{prefix}out_proj.weight"].T
    torch.testing.assert_close(folded_out, by_hand, rtol=1e-5, atol=1e-5)
