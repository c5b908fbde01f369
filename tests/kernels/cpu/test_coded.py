# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels over coded caches against float64, at every instruction-set level."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case, Problem, expected, layer_of, make, run, tolerance
from tests.kernels.cpu.test_kernels import alone
from tests.kernels.strategies import cases, codes
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels import Kernels, LayerSpec, ScoreOptions, Step
from vllm_eigen.kernels.coding import from_bytes, to_bytes
from vllm_eigen.kernels.cpu.build import supported_isas
from vllm_eigen.kernels.cpu.integers import IntegerRows
from vllm_eigen.kernels.cpu.kernels import CpuKernels

ISAS = supported_isas()
SETTINGS = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@cache
def kernels(isa: str) -> Kernels:
    return CpuKernels(isa)


@pytest.mark.parametrize("isa", ISAS)
@SETTINGS
@given(case=cases(coded=True))
def test_agrees_with_float64(isa: str, case: Case) -> None:
    problem = make(case)
    found = run(kernels(isa), problem, free_outside_window=True)
    limit = tolerance(case, rounds_keys=isa != "portable", in_integers=True)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=limit)


def reconstructing(code: Code, queries_per_head: int = 1) -> Case:
    """Decode and prompts over keys of `code`, slow pairs absorbed; blocks off the tiles' sizes."""
    return Case(
        queries_per_head=queries_per_head,
        rank_k=code.rank,
        rank_v=16,
        block_size=48,
        sequences=((700, 1), (40, 9), (255, 1), (256, 1), (9, 1)),
        dtype=torch.bfloat16,
        head_size=80,
        reconstruct=True,
        rotary_dim=64,
        rope_base=1e4,
        offset=True,
        codes=(code, Code(four=16, token_scale=True)),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("queries_per_head", [1, 4])
@pytest.mark.parametrize(
    "code",
    [
        *(Code(eight=4), Code(eight=36), Code(four=8), Code(four=72), Code(two=16), Code(two=176)),
        *(Code(eight=20, four=24), Code(eight=12, two=48), Code(four=40, two=16)),
        *(Code(eight=4, four=8, two=16), Code(eight=28, four=104, two=32)),
    ],
    ids=lambda code: f"{code.eight}-{code.four}-{code.two}",
)
def test_keys_of_every_mix_of_widths(isa: str, queries_per_head: int, code: Code) -> None:
    scales = [False, True] if code.eight + code.four else [False]
    for token_scale in scales:
        code = code.model_copy(update={"token_scale": token_scale})
        case = reconstructing(code, queries_per_head)
        problem = make(case)
        packed = CpuKernels(isa).prepare(layer_of(problem)).packed
        assert packed is not None
        assert isa == "amx" or packed.absorbed is not None
        assert (packed.integers is not None) == (isa != "portable")
        limit = tolerance(case, rounds_keys=isa != "portable", in_integers=True)
        found = run(kernels(isa), problem)
        np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=limit)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "code", [Code(eight=1024), Code(four=1024), Code(two=1024), Code(eight=8, four=128, two=16)]
)
def test_sums_hold_the_largest_codes(isa: str, code: Code) -> None:
    """Numbers of the basis are the largest of their row, codes of a token all last or first."""
    case = reconstructing(code)
    problem = make(case)
    assert problem.reconstruct is not None
    signs = torch.randn(problem.reconstruct.key_basis[:, :1].shape).sign()
    problem.reconstruct.key_basis[:] = signs / code.rank
    largest = torch.tensor([2.0**width for width in code.widths])
    for keys in problem.keys:
        keys[:] = (keys[..., :1].sign() * largest).to(keys.dtype)
    problem.options = dataclasses.replace(problem.options, scale=1.0 / float(largest.mean()))
    limit = tolerance(case, rounds_keys=isa != "portable", in_integers=True)
    found = run(kernels(isa), problem)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=limit)


@pytest.mark.parametrize("isa", ISAS)
@SETTINGS
@given(code=codes(), seed=st.integers(0, 2**20), size=st.sampled_from([1e-6, 0.6, 4.0, 300.0]))
def test_stores_the_codes_of_the_reference(isa: str, code: Code, seed: int, size: float) -> None:
    """One key per sequence: the output is the stored value, to the 15 bits of its probability."""
    count = 40
    values = torch.randn(count, 1, code.rank, generator=torch.Generator().manual_seed(seed)) * size
    values[::3] = (values[::3] * 2).round() / 2
    values[7] = 0.0
    key_code = Code(four=8)
    spec = LayerSpec(
        *(1, 1, 8, code.rank, torch.float32, torch.uint8, ScoreOptions(scale=1.0)),
        key_code=key_code,
        value_code=code,
    )
    layer = kernels(isa).prepare(spec)
    # Every place of a group of tokens.
    slots = torch.arange(count) * 16 + torch.arange(count) % 16
    kv_cache = torch.zeros(count, 1, 16, spec.key_width + spec.value_width, dtype=torch.uint8)
    layer.write_cache(torch.ones(count, 1, 8), values, kv_cache, slots)
    output = torch.empty(count, 1, code.rank)
    lengths = torch.arange(count).int() % 16 + 1
    step = Step(
        torch.arange(count + 1, dtype=torch.int32),
        lengths,
        torch.arange(count, dtype=torch.int32)[:, None],
        num_actual_tokens=count,
    )
    # The keys before the last are zero and far below it, their values never written: codes 0.
    layer.attend(
        torch.full((count, 1, 8), 20.0),
        kv_cache,
        output,
        kernels(isa).plan(step, spec.plan_geometry(16)),
    )
    exact = from_bytes(to_bytes(values, code), code)
    torch.testing.assert_close(output, exact, rtol=1e-5, atol=0)


def _batch(reconstruct: bool) -> Problem:
    """Prompts, of many rows and of few, among single tokens."""
    code = Code(eight=4, four=24, two=16, token_scale=True)
    return make(
        Case(
            queries_per_head=3,
            rank_k=code.rank,
            rank_v=code.rank,
            block_size=48,
            sequences=((1100, 1), (0, 150), (600, 2), (2000, 1)),
            dtype=torch.bfloat16,
            head_size=64,
            reconstruct=reconstruct,
            rotary_dim=64,
            rope_base=1e4,
            codes=(code, code),
        )
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reconstruct", [False, True])
def test_a_row_depends_on_its_sequence_alone(isa: str, reconstruct: bool) -> None:
    """Bit-identical alone or in a batch, with any number of threads."""
    problem = _batch(reconstruct)
    whole = run(kernels(isa), problem)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(run(kernels(isa), problem), whole)
    finally:
        torch.set_num_threads(threads)
    for i in range(len(problem.case.sequences)):
        rows = slice(int(problem.query_start_loc[i]), int(problem.query_start_loc[i + 1]))
        assert torch.equal(run(kernels(isa), alone(problem, i)), whole[rows])


@pytest.mark.skipif("amx" not in ISAS, reason="this processor has no AMX")
def test_matrix_units_add_up_the_integers_of_vectors() -> None:
    problem = _batch(reconstruct=False)
    assert torch.equal(run(kernels("amx"), problem), run(kernels("avx512bf16"), problem))


@given(codes(), st.integers(0, 2**20), st.booleans())
def test_integer_rows_are_close_to_the_basis(code: Code, seed: int, in_bytes: bool) -> None:
    """Products with codes, as the kernel adds them up, to the last bit of the basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(2, 6, code.rank, generator=generator)
    rows = IntegerRows.of(basis, code, in_bytes)
    widths = torch.tensor(code.widths)
    stored = (torch.rand(code.rank, generator=generator) * 2.0**widths).long()
    numbers = rows.basis.view(torch.int8)
    if in_bytes:
        low, high = numbers.long().split([code.eight, code.rank], dim=2)
        fine = (low * stored[: code.eight]).sum(dim=2)
        sums = (high * stored).sum(dim=2)
    else:
        halves, few_bits = numbers.split([2 * code.eight, code.rank - code.eight], dim=2)
        halves = halves.contiguous().view(torch.int16).long().unflatten(2, (2, -1, 2))
        in_order = halves.permute(0, 1, 3, 4, 2).flatten(2)
        fine = (in_order * (stored[: code.eight] - 128)).sum(dim=2)
        sums = (few_bits.long() * stored[code.eight :]).sum(dim=2)
    sums = ((fine + 64) >> 7) + sums
    found = (sums - rows.offset) * rows.scale.double()
    codes_meant = stored - (2.0**widths - 1).double() / 2
    exact = basis.double() @ codes_meant
    # Half a step of the basis for each code, a 128th of it for those of 8 bits.
    step = torch.where(widths == 8, 0.5 / 128, 0.5)
    limit = rows.scale.double() * ((step * codes_meant.abs()).sum() + 0.51)
    assert bool(((found - exact).abs() <= limit).all())
