"""Waves that span slow planes, and decode that uses them instead of rebuilding keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.kernels.absorb import CHUNK, find_waves, tolerance, turning_speeds
from vllm_eigen.kernels.build import supported_isas
from vllm_eigen.kernels.cpu import CpuKernels
from vllm_eigen.kernels.packed import PackedRebuild

from .cases import Case, expected, make, run
from .cases import tolerance as allowed


def speeds_of(base: float, planes: int) -> tuple[float, ...]:
    return tuple(base ** (-plane / planes) for plane in range(planes))


def table_of(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@settings(deadline=None, max_examples=30, derandomize=True)
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
    found = find_waves(speeds, queries_per_head, tolerance(dtype))
    if found is None:
        return
    slow = np.array(speeds[found.direct_planes :])
    angles = np.arange(CHUNK)[:, None] * slow
    spanned = np.concatenate(
        [
            np.einsum("mt,msj->stj", found.waves[: band.num_waves].double(), band.blend.double())
            for band in found.bands
        ],
        axis=2,
    )
    # Waves are stored in float32: a digit more than asked for.
    limit = tolerance(dtype) + 1e-6
    np.testing.assert_allclose(spanned[0], np.cos(angles), atol=limit)
    np.testing.assert_allclose(spanned[1], np.sin(angles), atol=limit)


def test_one_query_head_saves_more_than_half_of_the_products() -> None:
    for base in (1e4, 5e5):
        found = find_waves(speeds_of(base, 64), 1, 1e-6)
        assert found is not None
        assert found.cost(queries_per_head=1) < 64


def test_many_queries_share_a_rebuilt_key() -> None:
    assert find_waves(speeds_of(1e4, 64), 64, 1e-6) is None


def test_planes_that_turn_unevenly_are_rebuilt() -> None:
    found = find_waves((None, 0.0, 0.0, None) + (1e-3,) * 60, 1, 1e-6)
    assert found is not None
    assert found.direct_planes >= 4
    assert find_waves((None,) * 64, 1, 1e-6) is None


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
def test_decode_absorbs_slow_planes(isa: str, dtype: torch.dtype, queries_per_head: int) -> None:
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
    )
    problem = make(case)
    assert problem.rebuild is not None
    kernels = CpuKernels(isa)
    packed = kernels.prepare(problem.rebuild, dtype, case.num_heads)
    assert isinstance(packed, PackedRebuild)
    assert packed.absorbed is not None
    found = run(kernels, problem)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=allowed(case))
