# SPDX-License-Identifier: Apache-2.0
"""The streamed moments and the paper's bases against a float64 SVD of everything at once."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.calibration.methods import METHODS, get_method
from vllm_eigen.calibration.methods.base import Layer, StatisticsMethod
from vllm_eigen.calibration.model.activations import ActivationStream
from vllm_eigen.calibration.model.fold import read_attention
from vllm_eigen.calibration.model.hooks import capture
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.statistics.batch import Batch
from vllm_eigen.calibration.statistics.rotary import Rotation, rotate
from vllm_eigen.calibration.statistics.statistic import Accumulator
from vllm_eigen.checkpoint.families import Geometry
from vllm_eigen.checkpoint.modes import KeyMode


def _batches(geometry: Geometry, counts: list[int], seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)

    def heads(count: int, number: int) -> torch.Tensor:
        return torch.randn(2, count, number, geometry.head_size, generator=generator)

    return [
        Batch(
            query=heads(count, geometry.num_heads),
            key=heads(count, geometry.num_kv_heads),
            value=heads(count, geometry.num_kv_heads),
            context=heads(count, geometry.num_heads),
            probs=torch.full((2, geometry.num_heads, count, count), 1 / count).tril(),
            o_proj=torch.randn(16, geometry.num_heads, geometry.head_size, generator=generator),
        )
        for count in counts
    ]


@settings(max_examples=20, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([2, 4, 8]),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_paper_bases_are_the_svd_of_stacked_keys_and_queries(
    kv_heads: int, group: int, size: int, counts: list[int]
) -> None:
    geometry = Geometry(1, kv_heads * group, kv_heads, size, 16)
    method = get_method("paper")
    accumulator = Accumulator(method.statistics(KeyMode.NO_ROPE), geometry)
    batches = _batches(geometry, counts)
    for batch in batches:
        accumulator.add(batch)
    moments = accumulator.moments()
    bases = method.bases(Layer(0, geometry, moments, KeyMode.NO_ROPE))
    assert moments.tokens == 2 * sum(counts)

    def rows(name: str, head: int) -> np.ndarray:
        parts = [getattr(batch, name)[:, :, head].reshape(-1, size) for batch in batches]
        return torch.cat(parts).double().numpy()

    for head in range(kv_heads):
        queries = [rows("query", head * group + n) for n in range(group)]
        stacked = np.concatenate([rows("key", head), *queries])
        for basis, matrix in ((bases.key, stacked), (bases.value, rows("value", head))):
            singular = np.linalg.svd(matrix, compute_uv=False)
            padded = np.zeros(size)
            padded[: len(singular)] = singular
            energy = basis.energy[head].numpy() * moments.tokens
            np.testing.assert_allclose(energy, padded**2, rtol=1e-9, atol=1e-9 * padded[0] ** 2)
            for rank in range(1, size):
                encoder, decoder = (item[head].numpy() for item in basis.at(rank))
                lost = ((matrix - matrix @ encoder @ decoder) ** 2).sum()
                best = (padded[rank:] ** 2).sum()
                np.testing.assert_allclose(lost, best, atol=1e-8 * padded[0] ** 2)


def test_every_method_of_sums_gives_exact_maps_at_full_rank_even_without_data() -> None:
    geometry = Geometry(1, 4, 2, 4, 16)
    methods = [
        method for name in METHODS if isinstance(method := get_method(name), StatisticsMethod)
    ]
    assert len(methods) == 3
    for method in methods:
        for batches in ([], _batches(geometry, [1]), _batches(geometry, [40])):
            accumulator = Accumulator(method.statistics(KeyMode.PRE_ROPE), geometry)
            for batch in batches:
                accumulator.add(batch)
            moments = accumulator.moments()
            if not moments.tokens:
                moments = type(moments)(1, moments.totals)
            layer = Layer(0, geometry, moments, KeyMode.PRE_ROPE, method.head_group)
            bases = method.bases(layer)
            for basis in (bases.key, bases.value):
                eye = torch.eye(layer.latent_size, dtype=torch.float64)
                error = (basis.encoder @ basis.decoder - eye).abs().max()
                assert float(error) < 1e-5, method.name
                assert basis.loss.shape == (layer.latent_size + 1,)
                assert bool((basis.loss.diff() <= 1e-12).all())


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_rotate_matches_transformers_and_undoes_itself(family: str) -> None:
    """Pairs are halves of a head in Llama, and neighbours in its first dimensions in GLM-4."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8 if family == "llama" else 11)
    angles = torch.rand(1, 5, 4) * 6
    cos, sin = angles.cos() * 1.3, angles.sin() * 1.3
    heads, tables = x.transpose(1, 2), (cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))
    expected, _ = module.apply_rotary_pos_emb(heads, heads, *tables)
    rotation = Rotation(cos, sin, interleaved=family == "glm4")
    rotated = rotate(x, rotation)
    torch.testing.assert_close(rotated, expected.transpose(1, 2))
    torch.testing.assert_close(rotate(rotated, rotation, back=True), x)


def test_capture_sees_what_the_weights_say(make_model, tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = open_source(str(make_model("llama", attention_bias=True)))
    layerwise = LayerwiseModel(source, torch.device("cpu"))
    tokens = torch.randint(3, 60, (3, 16))
    stream = ActivationStream(layerwise, tokens)
    layer = layerwise.layer(0)
    normed = layer.input_layernorm(stream.hidden)
    seen: list[Batch] = []
    with capture(layer, source.family, source.geometry, seen.append):
        for _ in stream.advance(0, layer):
            pass
    path = source.family.attention_path(0)
    weights = read_attention(source.weights, path, source.family, source.geometry)
    for name, weight, bias in (
        ("query", weights.q, weights.q_bias),
        ("key", weights.k, weights.k_bias),
        ("value", weights.v, weights.v_bias),
    ):
        got = torch.cat([getattr(batch, name) for batch in seen])
        assert bias is not None
        expected = torch.einsum("blx,hdx->blhd", normed.double(), weight) + bias
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
