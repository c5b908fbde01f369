# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels against the float64 answer, at every instruction-set level of this machine."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case, Problem, expected, layer_of, make, run, tolerance
from tests.kernels.strategies import cases
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels import Kernels, LayerSpec, ScoreOptions, Step
from vllm_eigen.kernels.cpu.build import supported_isas
from vllm_eigen.kernels.cpu.kernels import RECONSTRUCT_BF16_FLAG, CpuKernels

ISAS = supported_isas()
SETTINGS = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@cache
def kernels(isa: str = ISAS[0]) -> Kernels:
    return CpuKernels(isa)


@pytest.mark.parametrize("isa", ISAS)
@SETTINGS
@given(case=cases())
def test_agrees_with_float64(isa: str, case: Case) -> None:
    problem = make(case)
    found = run(kernels(isa), problem, free_outside_window=True)
    limit = tolerance(case, rounds_keys=isa in ("amx", "avx512bf16"))
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=limit)


@pytest.fixture(scope="module")
def bf16_kernels() -> Kernels:
    """Kernels that reconstruct in bfloat16, as machines that multiply it do."""
    return CpuKernels(ISAS[0], (RECONSTRUCT_BF16_FLAG, "-O1"))


@SETTINGS
@given(case=cases(dtypes=(torch.bfloat16,), reconstruct=True))
def test_keys_reconstructed_in_bf16(bf16_kernels: Kernels, case: Case) -> None:
    problem = make(case)
    found = run(bf16_kernels, problem, free_outside_window=True)
    limit = tolerance(case, rounds_keys=True)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=limit)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_stores_every_number_as_torch_does(isa: str, cache_dtype: torch.dtype) -> None:
    """One key per sequence: the output is the stored value itself."""
    codes = torch.arange(2 ** (8 * cache_dtype.itemsize)).to(
        {1: torch.uint8, 2: torch.uint16}[cache_dtype.itemsize]
    )
    exact = codes.view(cache_dtype).float()
    exact = exact[exact.isfinite()].sort().values[:: 1 if cache_dtype.itemsize == 1 else 37]
    halfway = (exact[1:] + exact[:-1]) / 2
    limit = torch.finfo(cache_dtype).max
    numbers = torch.cat([exact, halfway, halfway.nextafter(exact[1:])]).clamp(-limit, limit)
    numbers = numbers[: numbers.shape[0] // 16 * 16].view(-1, 1, 16)
    count = numbers.shape[0]
    kv_cache = torch.zeros(count, 1, 16, 17, dtype=cache_dtype)
    slots = torch.arange(count) * 16
    spec = LayerSpec(1, 1, 1, 16, torch.float32, cache_dtype, ScoreOptions(scale=1.0))
    layer = kernels(isa).prepare(spec)
    layer.write_cache(torch.ones(count, 1, 1), numbers, kv_cache, slots)
    output = torch.empty(count, 1, 16)
    step = Step(
        torch.arange(count + 1, dtype=torch.int32),
        torch.ones(count, dtype=torch.int32),
        torch.arange(count, dtype=torch.int32)[:, None],
        num_actual_tokens=count,
    )
    plan = kernels(isa).plan(step, spec.plan_geometry(16))
    layer.attend(torch.ones(count, 1, 1), kv_cache, output, plan)
    assert torch.equal(output, numbers.to(cache_dtype).float())


def test_fp8_saturates() -> None:
    case = Case(cache_dtype=torch.float8_e4m3fn, sequences=((0, 1),), v_scale=0.001)
    problem = make(case)
    found = run(kernels(), problem)
    assert float(found.abs().max()) == pytest.approx(0.448)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reconstruct", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_depends_on_its_sequencealone(
    isa: str, reconstruct: bool, dtype: torch.dtype
) -> None:
    """Bit-identical alone or in a batch, with one thread or two, prompt whole or in chunks."""
    case = Case(
        num_kv_heads=2,
        queries_per_head=3,
        rank_k=21,
        rank_v=35,
        block_size=48,
        sequences=((1100, 1), (0, 150), (300, 7), (2000, 1), (13, 1), (600, 90)),
        dtype=dtype,
        head_size=64,
        reconstruct=reconstruct,
        rotary_dim=64,
        rope_base=1e4,
    )
    problem = make(case)
    k = kernels(isa)
    whole = run(k, problem)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(run(k, problem), whole)
    finally:
        torch.set_num_threads(threads)
    for i in range(len(case.sequences)):
        rows = slice(int(problem.query_start_loc[i]), int(problem.query_start_loc[i + 1]))
        assert torch.equal(run(k, alone(problem, i)), whole[rows])
        # The only query of a step does not reconstruct every key, a prompt does: not the same bits.
        last = alone(problem, i, last=2 if reconstruct and case.sequences[i][1] > 1 else 1)
        kept = last.case.sequences[0][1]
        assert torch.equal(run(k, last), whole[rows][-kept:])


def alone(problem: Problem, i: int, last: int | None = None) -> Problem:
    """Sequence i by itself, or only its `last` query tokens; test_coded.py uses it too."""
    old, new = problem.case.sequences[i]
    kept = new if last is None else last
    end = int(problem.query_start_loc[i + 1])
    return dataclasses.replace(
        problem,
        case=dataclasses.replace(problem.case, sequences=((old + new - kept, kept),)),
        query=problem.query[end - kept : end + 1],
        keys=[problem.keys[i]],
        values=[problem.values[i]],
        query_start_loc=torch.tensor([0, kept], dtype=torch.int32),
        seq_lens=problem.seq_lens[i : i + 1],
        block_table=problem.block_table[i : i + 1],
    )


def test_strided_queries_and_outputs() -> None:
    """Slices of a fused projection, as vLLM passes them."""
    problem = make(Case(sequences=((40, 9),), queries_per_head=2, dtype=torch.bfloat16))
    plain = run(kernels(), problem)
    fused = torch.zeros(problem.query.shape[0], problem.query.shape[1] + 3, 8).bfloat16()
    fused[:, 1:-2] = problem.query
    problem.query = fused[:, 1:-2]
    assert torch.equal(run(kernels(), problem), plain)


@settings(SETTINGS, max_examples=10)
@given(st.integers(1, 64), st.integers(0, 3))
def test_sequences_without_queries_are_skipped(length: int, empty: int) -> None:
    sequences = [(length, 2), (length, 1)]
    sequences.insert(empty % 3, (length, 0))
    problem = make(Case(sequences=tuple(sequences)))
    found = run(kernels(), problem)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": torch.tensor([[9999]], dtype=torch.int32)}, "outside the cache"),
        ({"seq_lens": torch.tensor([9999], dtype=torch.int32)}, "longer than"),
        ({"seq_lens": torch.tensor([5])}, "must be int32"),
        ({"query_start_loc": torch.tensor([0, 2, 5], dtype=torch.int32)}, "disagree"),
        ({"query": torch.zeros(6, 2, 9)}, "does not fit"),
        ({"query": torch.zeros(6, 2, 8).double()}, "does not fit"),
    ],
)
def test_misuse_is_one_clear_error(change: dict[str, torch.Tensor], message: str) -> None:
    problem = make(Case())
    spec = layer_of(problem)
    tables = {
        "query_start_loc": problem.query_start_loc,
        "seq_lens": problem.seq_lens,
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
    }
    query = change.get("query", problem.query)
    tables |= {name: table for name, table in change.items() if name in tables}
    layer = kernels().prepare(spec)
    with pytest.raises(KernelError, match=message):
        plan = kernels().plan(Step(**tables, num_actual_tokens=5), spec.plan_geometry(16))
        layer.attend(query, torch.zeros(3, 2, 16, 16), torch.zeros(6, 2, 8), plan)


def test_slots_outside_the_cache_are_refused() -> None:
    rows = torch.zeros(1, 2, 8)
    layer = kernels().prepare(layer_of(make(Case())))
    with pytest.raises(KernelError, match="outside the cache"):
        layer.write_cache(rows, rows, torch.zeros(3, 2, 16, 16), torch.tensor([48]))
