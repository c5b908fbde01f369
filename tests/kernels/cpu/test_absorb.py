# SPDX-License-Identifier: Apache-2.0
"""Frequency bases of slow RoPE pairs, and decode that uses them instead of reconstructing keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case, expected, layer_of, make, run
from tests.kernels.cases import tolerance as allowed
from vllm_eigen.kernels.cpu.absorb import (
    KV_CHUNK,
    PAIRS_AT_ONCE,
    find_frequency_basis,
    tolerance,
)
from vllm_eigen.kernels.cpu.build import supported_isas
from vllm_eigen.kernels.cpu.kernels import CpuKernels
from vllm_eigen.kernels.cpu.pack import Target, pack, pack_table
from vllm_eigen.kernels.interface import KeyReconstruction
from vllm_eigen.kernels.rope import pair_order


def frequencies_of(base: float, pairs: int) -> tuple[float, ...]:
    return tuple(base ** (-pair / pairs) for pair in range(pairs))


def dense(pairs: int) -> tuple[float, ...]:
    """What reconstructing costs where every pair reads all latents."""
    return tuple(2.0 * count for count in range(pairs + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("head_size", "rotary_dim", "queries_per_head", "base"),
    [
        pytest.param(128, 64, 16, 1e4, id="GLM-4 9B"),
        pytest.param(64, 16, 1, 1e4, id="StableLM 2 1.6B"),
        pytest.param(160, 40, 4, 1e4, id="StableLM 2 12B"),
        pytest.param(128, 96, 3, 1e4, id="Phi-4-mini"),
        pytest.param(256, 64, 8, 1e7, id="Qwen3-Next"),
    ],
)
def test_dimensions_that_do_not_rotate_are_not_reconstructed(
    head_size: int, rotary_dim: int, queries_per_head: int, base: float, dtype: torch.dtype
) -> None:
    rotary, still = rotary_dim // 2, (head_size - rotary_dim) // 2
    frequencies = frequencies_of(base, rotary) + (0.0,) * still
    found = find_frequency_basis(
        frequencies, dense(rotary + still), queries_per_head, tolerance(dtype)
    )
    assert found is not None
    # Pairs are reconstructed several at once, so the last ones may be of both kinds.
    assert found.direct_pairs < rotary + PAIRS_AT_ONCE
    # One absorbed query, the same in every chunk.
    assert found.bands[-1].num_functions == 1


@settings(deadline=None, max_examples=30, derandomize=True)
@example(base=1e4, pairs=48, still=16, queries_per_head=1, dtype=torch.float32)
@given(
    base=st.floats(10.0, 1e6),
    pairs=st.integers(1, 64),
    still=st.integers(0, 16),
    queries_per_head=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_frequency_basis_spans_the_cosines_and_sines_of_slow_pairs(
    base: float, pairs: int, still: int, queries_per_head: int, dtype: torch.dtype
) -> None:
    frequencies = frequencies_of(base, pairs) + (0.0,) * still
    found = find_frequency_basis(
        frequencies, dense(len(frequencies)), queries_per_head, tolerance(dtype)
    )
    if found is None:
        return
    slow = np.array(frequencies[found.direct_pairs :])
    angles = np.arange(KV_CHUNK)[:, None] * slow
    products = [
        found.functions[: band.num_functions, None, :, None].double()
        * band.coefficients[:, :, None].double()
        for band in found.bands
    ]
    spanned = torch.cat([product.sum(0) for product in products], dim=2).numpy()
    sizes = torch.cat([product.abs().sum(0) for product in products], dim=2).numpy()
    # Functions and coefficients are each rounded to float32.
    limit = tolerance(dtype) + 2.0**-23 * sizes
    assert (np.abs(spanned[0] - np.cos(angles)) <= limit[0]).all()
    assert (np.abs(spanned[1] - np.sin(angles)) <= limit[1]).all()


def test_one_query_head_saves_more_than_half_of_the_products() -> None:
    for base in (1e4, 5e5):
        found = find_frequency_basis(frequencies_of(base, 64), dense(64), 1, 1e-6)
        assert found is not None
        assert 2 * found.direct_pairs + found.cost(1.0) < 64


def test_pairs_that_read_few_latents_are_reconstructed_more_readily() -> None:
    few = tuple(share**2 / 128 for share in dense(64))
    every, found = (
        find_frequency_basis(frequencies_of(1e4, 64), costs, 1, 1e-6) for costs in (dense(64), few)
    )
    assert every is not None
    assert found is not None
    assert found.direct_pairs > every.direct_pairs


def test_many_queries_share_a_reconstructed_key() -> None:
    assert find_frequency_basis(frequencies_of(1e4, 64), dense(64), 64, 1e-6) is None


def test_pairs_that_rotate_unevenly_are_reconstructed() -> None:
    found = find_frequency_basis((None, 0.0, 0.0, None) + (1e-3,) * 60, dense(64), 1, 1e-6)
    assert found is not None
    assert found.direct_pairs >= 4
    assert find_frequency_basis((None,) * 64, dense(64), 1, 1e-6) is None


@pytest.mark.parametrize("in_bf16", [False, True])
def test_a_pair_reads_as_many_latents_as_its_basis_has(in_bf16: bool) -> None:
    case = Case(rank_k=7, head_size=12, reconstruct=True, rotary_dim=8, triangular=True)
    reconstruct = make(case).reconstruct
    assert reconstruct is not None
    depth = pack(
        reconstruct, Target(in_bf16, torch.float32, 1), pack_table(reconstruct.rotary)
    ).depth
    assert depth.tolist() == ([1, 2, 3, 4, 4, 4] if in_bf16 else [2, 4, 6, 7, 7, 7])
    reconstruct.key_basis[0, 6, pair_order(12, 8, True)[0]] = 1.0
    changed = KeyReconstruction(reconstruct.key_basis, reconstruct.rotary)
    assert (
        pack(changed, Target(False, torch.float32, 1), pack_table(changed.rotary)).depth.tolist()
        == [7] * 6
    )


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries_per_head", [1, 3])
@pytest.mark.parametrize("triangular", [False, True])
def test_decode_absorbs_slow_pairs(
    isa: str, dtype: torch.dtype, queries_per_head: int, triangular: bool
) -> None:
    case = Case(
        queries_per_head=queries_per_head,
        rank_k=37,
        rank_v=21,
        sequences=((700, 1), (40, 9), (255, 1), (256, 1), (9, 1)),
        dtype=dtype,
        head_size=128,
        reconstruct=True,
        rotary_dim=96,
        rope_base=1e4,
        offset=True,
        triangular=triangular,
    )
    problem = make(case)
    assert problem.reconstruct is not None
    kernels = CpuKernels(isa)
    packed = kernels.prepare(layer_of(problem)).packed
    assert packed is not None
    assert packed.absorbed is not None
    found = run(kernels, problem)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=allowed(case))
