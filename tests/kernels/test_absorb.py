"""Waves that span slow planes, and decode that uses them instead of rebuilding keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_eigen.kernels.absorb import CHUNK, find_waves, tolerance, turning_speeds
from vllm_eigen.kernels.build import supported_isas
from vllm_eigen.kernels.cpu import CpuKernels
from vllm_eigen.kernels.interface import Rebuild
from vllm_eigen.kernels.packed import PackedRebuild, Reader, pack
from vllm_eigen.kernels.planes import plane_order

from .cases import Case, expected, make, run
from .cases import tolerance as allowed


def speeds_of(base: float, planes: int) -> tuple[float, ...]:
    return tuple(base ** (-plane / planes) for plane in range(planes))


def dense(planes: int) -> tuple[float, ...]:
    """What rebuilding costs where every plane reads all latents."""
    return tuple(2.0 * count for count in range(planes + 1))


def table_of(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@settings(deadline=None, max_examples=30, derandomize=True)
@example(base=1e4, planes=48, still=16, queries_per_head=1, dtype=torch.float32)
@given(
    base=st.floats(10.0, 1e6),
    planes=st.integers(1, 64),
    still=st.integers(0, 16),
    queries_per_head=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_waves_are_the_cosines_and_sines_of_slow_planes(
    base: float, planes: int, still: int, queries_per_head: int, dtype: torch.dtype
) -> None:
    speeds = speeds_of(base, planes) + (0.0,) * still
    found = find_waves(speeds, dense(len(speeds)), queries_per_head, tolerance(dtype))
    if found is None:
        return
    slow = np.array(speeds[found.direct_planes :])
    angles = np.arange(CHUNK)[:, None] * slow
    products = [
        found.waves[: band.num_waves, None, :, None].double() * band.blend[:, :, None].double()
        for band in found.bands
    ]
    spanned = torch.cat([product.sum(0) for product in products], dim=2).numpy()
    sizes = torch.cat([product.abs().sum(0) for product in products], dim=2).numpy()
    # Waves and blends are each rounded to float32.
    limit = tolerance(dtype) + 2.0**-23 * sizes
    assert (np.abs(spanned[0] - np.cos(angles)) <= limit[0]).all()
    assert (np.abs(spanned[1] - np.sin(angles)) <= limit[1]).all()


def test_one_query_head_saves_more_than_half_of_the_products() -> None:
    for base in (1e4, 5e5):
        found = find_waves(speeds_of(base, 64), dense(64), 1, 1e-6)
        assert found is not None
        assert 2 * found.direct_planes + found.cost < 64


def test_planes_that_read_few_latents_are_rebuilt_more_readily() -> None:
    few = tuple(share**2 / 128 for share in dense(64))
    every, found = (find_waves(speeds_of(1e4, 64), costs, 1, 1e-6) for costs in (dense(64), few))
    assert every is not None
    assert found is not None
    assert found.direct_planes > every.direct_planes


def test_many_queries_share_a_rebuilt_key() -> None:
    assert find_waves(speeds_of(1e4, 64), dense(64), 64, 1e-6) is None


def test_planes_that_turn_unevenly_are_rebuilt() -> None:
    found = find_waves((None, 0.0, 0.0, None) + (1e-3,) * 60, dense(64), 1, 1e-6)
    assert found is not None
    assert found.direct_planes >= 4
    assert find_waves((None,) * 64, dense(64), 1, 1e-6) is None


@pytest.mark.parametrize("pairs", [False, True])
def test_a_plane_reads_as_many_latents_as_its_basis_has(pairs: bool) -> None:
    case = Case(rank_k=7, head_size=12, rebuild=True, rotary_dim=8, staircase=True)
    rebuild = make(case).rebuild
    assert rebuild is not None
    depth = pack(rebuild, Reader(pairs, torch.float32, 1)).depth
    assert depth.tolist() == ([1, 2, 3, 4, 4, 4] if pairs else [2, 4, 6, 7, 7, 7])
    rebuild.key_basis[0, 6, plane_order(12, 8, True)[0]] = 1.0
    changed = Rebuild(rebuild.key_basis, rebuild.cos_sin, rebuild.rotary_dim)
    assert pack(changed, Reader(False, torch.float32, 1)).depth.tolist() == [7] * 6


def test_speeds_of_a_table() -> None:
    expected_speeds = torch.tensor(speeds_of(1e4, 8))
    angles = torch.arange(5000)[:, None] * expected_speeds
    found = turning_speeds(1.2 * table_of(angles))  # tables of long contexts are scaled
    assert all(speed is not None for speed in found)
    np.testing.assert_allclose(found, expected_speeds, rtol=1e-5)


@pytest.mark.parametrize("positions", [1, 700])
def test_tables_without_one_speed(positions: int) -> None:
    """Too short to tell, or another regime from the second chunk on."""
    angles = torch.arange(positions)[:, None] * torch.tensor([0.5, 0.01])
    angles[300:, 1] *= 1.01
    assert turning_speeds(table_of(angles))[1] is None


def test_a_rounded_table_has_no_speed() -> None:
    angles = torch.arange(700)[:, None] * torch.tensor([0.5, 0.01])
    assert turning_speeds(table_of(angles).bfloat16()) == (None, None)


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries_per_head", [1, 3])
@pytest.mark.parametrize("staircase", [False, True])
def test_decode_absorbs_slow_planes(
    isa: str, dtype: torch.dtype, queries_per_head: int, staircase: bool
) -> None:
    case = Case(
        queries_per_head=queries_per_head,
        rank_k=37,
        rank_v=21,
        sequences=((700, 1), (40, 9), (255, 1), (256, 1), (9, 1)),
        dtype=dtype,
        head_size=128,
        rebuild=True,
        rotary_dim=96,
        rope_base=1e4,
        offset=True,
        staircase=staircase,
    )
    problem = make(case)
    assert problem.rebuild is not None
    kernels = CpuKernels(isa)
    packed = kernels.prepare(problem.rebuild, dtype, case.num_heads)
    assert isinstance(packed, PackedRebuild)
    assert packed.absorbed is not None
    found = run(kernels, problem)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=allowed(case))
