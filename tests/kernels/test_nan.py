# SPDX-License-Identifier: Apache-2.0
"""NaN in, NaN out: a NaN reaches the rows of the queries that attend to it, and no others."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case, attending, make, poisoned, run, tolerance
from tests.kernels.strategies import cases
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels import Kernels, load
from vllm_eigen.kernels.cpu.build import supported_isas
from vllm_eigen.kernels.cpu.kernels import CpuKernels

BACKENDS = ("reference", *supported_isas())


@cache
def kernels(backend: str) -> Kernels:
    return load("reference") if backend == "reference" else CpuKernels(backend)


def nan_of(dtype: torch.dtype, all_ones: bool) -> torch.Tensor:
    """Torch's NaN, or the one whose bits are all set, which rounding its bits would destroy."""
    return poisoned((1,), dtype)[0] if all_ones else torch.tensor(float("nan"), dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
@given(
    case=st.one_of(cases(), cases(coded=True)),
    place=st.sampled_from(["query", "key", "value"]),
    where=st.tuples(*4 * [st.floats(0, 0.999)]),
    all_ones=st.booleans(),
)
def test_a_nan_reaches_the_rows_that_attend_to_it(
    backend: str, case: Case, place: str, where: tuple[float, ...], all_ones: bool
) -> None:
    case = dataclasses.replace(case, encoded_size=0)
    if case.codes and not (case.codes[0] if place == "key" else case.codes[1]).token_scale:
        place = "query"  # nothing in the cache could hold it
    problem = make(case)
    clean = run(kernels(backend), problem)
    sequence = int(where[0] * len(case.sequences))
    nan = nan_of(case.dtype, all_ones)
    if place == "query":
        row, head = int(where[1] * clean.shape[0]), int(where[2] * case.num_heads)
        problem.query[row, head, int(where[3] * case.query_size)] = nan
        reached = torch.zeros(clean.shape[:2], dtype=torch.bool)
        reached[row, head] = True
    else:
        latents = (problem.keys if place == "key" else problem.values)[sequence]
        token, head = int(where[1] * latents.shape[0]), int(where[2] * case.num_kv_heads)
        latents[token, head, int(where[3] * latents.shape[2])] = nan
        reached = attending(problem, sequence, head, token)
    found = run(kernels(backend), problem)
    is_nan = found.isnan().any(dim=2) if place == "value" else found.isnan().all(dim=2)
    assert torch.equal(is_nan, reached)
    if backend == "reference":
        # It multiplies row by row where a value is not finite.
        limit = tolerance(case)
        torch.testing.assert_close(found[~reached], clean[~reached], atol=limit, rtol=0)
    else:
        assert torch.equal(found[~reached], clean[~reached])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("reconstruct", [False, True])
@pytest.mark.parametrize("code", [None, Code(four=24, token_scale=True)])
def test_memory_never_attended_to_reaches_no_output(
    backend: str, cache_dtype: torch.dtype | None, reconstruct: bool, code: Code | None
) -> None:
    """`run` fills the cache, and blocks behind the window, with NaN."""
    case = Case(
        rank_k=code.rank if code else 21,
        rank_v=code.rank if code else 19,
        codes=(code, code) if code else None,
        sequences=((301, 1), (40, 33), (0, 1)),
        dtype=torch.bfloat16,
        cache_dtype=cache_dtype,
        head_size=64,
        reconstruct=reconstruct,
        rotary_dim=64,
        rope_base=1e4,
        window=50,
    )
    assert bool(run(kernels(backend), make(case), free_outside_window=True).isfinite().all())
