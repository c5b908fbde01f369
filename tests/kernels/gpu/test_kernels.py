# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the float64 answer: on a GPU, or interpreted on the CPU.

Triton decides when a kernel is defined whether it will be interpreted. So without a GPU the first
test runs this file again in a process of its own, with TRITON_INTERPRET=1, and the others, outside
of it, are skipped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.cases import Case, expected, layer_of, make, run, step_of, tolerance
from tests.kernels.gpu.moving import (
    HAS_GPU,
    INTERPRETED,
    RUNS_HERE,
    SETTINGS,
    Moving,
    alone_as_in_company,
    close,
    move,
    needs_kernels,
    run_interpreted,
    small,
    with_nan,
)
from tests.kernels.strategies import cases
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels import Latents, LayerSpec, Limits, RotaryTable, ScoreOptions, Step

pytest.importorskip("triton")

if RUNS_HERE:
    from vllm_eigen.kernels.gpu.kernels import GpuKernels


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
@pytest.mark.slow
def test_without_a_gpu() -> None:
    run_interpreted(__file__)


@needs_kernels
@SETTINGS
@given(case=cases(), index=st.integers(0, 3))
def test_agrees_with_float64(case: Case, index: int) -> None:
    if case.dtype == torch.float32 and max(case.rank_k, case.head_size) > 100:
        # Their bases may fill no GPU's shared memory, and are then refused.
        case = dataclasses.replace(case, dtype=torch.bfloat16)
    close(small(case), Moving(index))


@needs_kernels
@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reconstructs_keys_of_a_group(dtype: torch.dtype, is_neox_style: bool) -> None:
    """Relative rotation (float32 tables) and the table itself (bfloat16 ones)."""
    case = Case(
        num_kv_heads=1,
        group=2,
        queries_per_head=2,
        rank_k=77,
        rank_v=33,
        sequences=((150, 1), (3, 40), (0, 1)),
        dtype=dtype,
        head_size=64,
        reconstruct=True,
        rotary_dim=48,
        is_neox_style=is_neox_style,
        offset=True,
        alibi=True,
        soft_cap=3.0,
    )
    close(case, Moving(1))


@needs_kernels
@pytest.mark.parametrize("reconstruct", [False, True])
def test_bounds_and_company_change_nothing(reconstruct: bool) -> None:
    """A sequence gets the same bits alone, in a mixed batch, and with bounds from the host."""
    case = Case(
        queries_per_head=2,
        rank_k=20,
        rank_v=17,
        # 11 queries of two heads are in two decode programs.
        sequences=((140, 11), (0, 30), (90, 3)),
        reconstruct=reconstruct,
        rotary_dim=16,
        window=100,
    )
    alone_as_in_company(case)


@needs_kernels
@pytest.mark.parametrize("queries_per_head", [1, 4, 8])
@pytest.mark.parametrize(
    ("reconstruct", "window", "cache_dtype"),
    [(False, None, None), (True, 50, None), (False, None, torch.float8_e5m2)],
)
def test_decodes_up_to_16_queries(
    queries_per_head: int, reconstruct: bool, window: int | None, cache_dtype: torch.dtype | None
) -> None:
    """In splits of 64 keys, of which some queries of a sequence see fewer; 17 are a prompt."""
    case = Case(
        num_kv_heads=1,
        queries_per_head=queries_per_head,
        rank_k=20,
        rank_v=18,
        sequences=((108, 16), (60, 7), (90, 1), (0, 16), (47, 17)),
        reconstruct=reconstruct,
        window=window,
        cache_dtype=cache_dtype,
    )
    close(case, Moving(1, hints=True))


@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter calls")
def test_decode_programs_without_queries_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_eigen.kernels.gpu.plain import attention

    tiles, softmax = [], attention.online_softmax

    def counted(logits: Any, *rest: Any) -> Any:
        tiles.append(logits.shape)
        return softmax(logits, *rest)

    monkeypatch.setattr(attention, "online_softmax", counted)
    case = Case(num_kv_heads=1, queries_per_head=4, sequences=((4, 16), (9, 1), (0, 6)))
    close(case, Moving(hints=True))
    # Of three sequences with four programs each: 16, 1 and 6 queries, four a program.
    assert len(tiles) == 4 + 1 + 2


@needs_kernels
def test_heads_of_256() -> None:
    """Their keys are reconstructed in four chunks of columns."""
    case = Case(
        num_kv_heads=1,
        queries_per_head=2,
        rank_k=24,
        rank_v=16,
        sequences=((140, 1), (3, 12)),
        dtype=torch.bfloat16,
        head_size=256,
        reconstruct=True,
        rotary_dim=256,
        rope_base=10_000.0,
    )
    close(case, Moving(1))


@needs_kernels
@pytest.mark.parametrize("reconstruct", [False, True])
@pytest.mark.parametrize("cache_dtype", [torch.uint8, torch.float8_e5m2])
def test_reads_fp8_in_pairs(cache_dtype: torch.dtype, reconstruct: bool) -> None:
    """Even ranks; what hypothesis finds is mostly odd, and read byte by byte."""
    case = Case(
        num_kv_heads=1,
        queries_per_head=2,
        rank_k=24,
        rank_v=80,
        sequences=((70, 1), (3, 5)),
        dtype=torch.bfloat16,
        cache_dtype=cache_dtype,
        k_scale=0.5,
        v_scale=2.0,
        reconstruct=reconstruct,
        offset=reconstruct,
    )
    close(case, Moving(1))


@needs_kernels
@pytest.mark.parametrize("encoded_size", [0, 32])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_padded_for_wider_layers(reconstruct: bool, encoded_size: int) -> None:
    """What is padded for other layers' ranks changes no result, and no other byte of the cache."""
    case = Case(
        queries_per_head=2,
        rank_k=24,
        rank_v=16,
        sequences=((140, 1), (0, 30)),
        reconstruct=reconstruct,
        encoded_size=encoded_size,
    )
    close(case, Moving(1, peers=(Latents(72, 120), Latents(8, 104))))


@needs_kernels
@pytest.mark.parametrize("reconstruct", [False, True])
def test_a_warm_up_changes_nothing(reconstruct: bool) -> None:
    """It runs every kernel, and leaves the workspace as steps expect it."""
    case = Case(rank_k=20, rank_v=17, sequences=((140, 1), (0, 30)), reconstruct=reconstruct)
    problem = make(case)
    kernels = Moving(1)
    limits = Limits(2, 256, torch.device("cuda" if HAS_GPU else "cpu"))
    kernels.inner.warm_up(limits, [kernels.prepare(layer_of(problem)).inner], case.block_size)
    assert torch.equal(run(kernels, problem), run(Moving(1), problem))


@needs_kernels
@pytest.mark.parametrize("seqs_at_once", [1, 4])
def test_a_step_served_in_parts_is_the_same(
    seqs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_eigen.kernels.gpu import workspace

    case = Case(
        queries_per_head=2,
        rank_k=20,
        rank_v=17,
        sequences=((140, 1), (0, 30), (90, 3), (64, 1), (3, 2), (130, 4)),
    )
    problem = make(case)
    whole = run(Moving(1), problem)
    np.testing.assert_allclose(whole, expected(problem), atol=tolerance(case))
    monkeypatch.setattr(workspace, "_seqs_at_once", lambda rows, width: seqs_at_once)
    assert torch.equal(run(Moving(1), problem), whole)


@needs_kernels
def test_a_table_without_frequencies_is_read_by_position() -> None:
    """Pairs that do not rotate by a constant angle cannot be split into start and offset."""
    case = Case(sequences=((100, 1),), reconstruct=True)
    problem = make(case)
    assert problem.reconstruct is not None
    bent = problem.reconstruct.rotary.cos_sin.flip(0).contiguous()
    cos, sin = bent.double().numpy()[:, :4], bent.double().numpy()[:, 4:]
    reconstruct = dataclasses.replace(problem.reconstruct, rotary=RotaryTable(bent))
    problem = dataclasses.replace(problem, reconstruct=reconstruct, rotary=(cos, sin))
    found = run(Moving(), problem)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=tolerance(case))


@needs_kernels
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_stores_fp8_as_torch_does(cache_dtype: torch.dtype) -> None:
    """Every code, every halfway point, and what saturates."""
    codes = torch.arange(256).to(torch.uint8).view(cache_dtype).float()
    exact = codes[codes.isfinite()].sort().values
    halfway = (exact[1:] + exact[:-1]) / 2
    limit = torch.finfo(cache_dtype).max
    numbers = torch.cat([exact, halfway, torch.tensor([2 * limit, -2 * limit])])
    numbers = numbers[: numbers.shape[0] // 8 * 8].view(-1, 1, 8)
    count = numbers.shape[0]
    cache = torch.zeros(-(-count // 16), 1, 16, 16, dtype=cache_dtype)
    spec = LayerSpec(1, 1, 8, 8, torch.float32, cache_dtype, ScoreOptions(1.0))
    Moving().prepare(spec).write_cache(numbers, numbers, cache, torch.arange(count))
    stored = cache.view(torch.uint8).view(-1, 16)[:count, 8:].view(cache_dtype).float()
    wanted = numbers[:, 0].clamp(-limit, limit).to(cache_dtype).float()
    assert torch.equal(stored, wanted)


@needs_kernels
@pytest.mark.parametrize("projects_values", [True, False])
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.uint8])
def test_down_projects_into_fp8(cache_dtype: torch.dtype, projects_values: bool) -> None:
    """As torch rounds the float32 products, but for those beside the middle of two values."""
    case = Case(
        rank_k=20,
        rank_v=33,
        sequences=((90, 1),),
        encoded_size=48,
        projects_values=projects_values,
    )
    problem = make(case)
    [(key, value)] = problem.written
    cache = torch.zeros(6, 2, 16, 53, dtype=cache_dtype)
    slots = torch.arange(91)
    spec = dataclasses.replace(
        layer_of(problem), cache_dtype=cache_dtype, k_scale=0.1, v_scale=0.02
    )
    Moving().prepare(spec).write_cache(key, value, cache, slots)
    stored = cache.view(torch.float8_e4m3fn).transpose(1, 2).reshape(-1, 2, 53)[:91].float()
    wanted = torch.cat([problem.keys[0] / 0.1, problem.values[0] / 0.02], dim=-1).clamp(-448, 448)
    assert bool(((stored - wanted).abs() <= wanted.abs() / 16 + 2**-10).all())
    exact = stored == wanted.to(torch.float8_e4m3fn).float()
    assert float(exact.float().mean()) > 0.999


@needs_kernels
@pytest.mark.parametrize(
    "wrong",
    [
        {"query": torch.zeros(2, 2, 9)},
        {"query": torch.zeros(2, 3, 8)},
        {"query": torch.zeros(2, 2, 8, dtype=torch.float64)},
        {"output": torch.zeros(1, 2, 8)},
        {"kv_cache": torch.zeros(1, 2, 16, 16, dtype=torch.float16)},
        {"kv_cache": torch.zeros(1, 2, 16, 32)[..., ::2]},
        {"scores": ScoreOptions(1.0, alibi_slopes=torch.zeros(3))},
        {"seq_lens": torch.tensor([2, 2], dtype=torch.int32)},
        {"block_table": torch.zeros(1, 1, dtype=torch.int64)},
        {"query_start_loc_cpu": torch.tensor([0, 1, 2], dtype=torch.int32)},
        {"rank_k": 300},
        {"num_heads": 3},
    ],
)
def test_refuses_what_does_not_fit(wrong: dict[str, Any]) -> None:
    layer: dict[str, Any] = {
        **{
            "num_heads": 2,
            "num_kv_heads": 2,
            "rank_k": 8,
            "rank_v": 8,
            "scores": ScoreOptions(1.0),
        },
        **{"dtype": torch.float32, "cache_dtype": torch.float32},
    }
    step: dict[str, Any] = {
        "query_start_loc": torch.tensor([0, 2], dtype=torch.int32),
        "seq_lens": torch.tensor([2], dtype=torch.int32),
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "num_actual_tokens": 2,
        "query_start_loc_cpu": None,
    }
    call: dict[str, Any] = {
        "query": torch.zeros(2, 2, 8),
        "kv_cache": torch.zeros(1, 2, 16, 16),
        "output": torch.zeros(2, 2, 8),
    }

    def attend(wrong: dict[str, Any]) -> None:
        layer_, step_, call_ = (
            {name: wrong.get(name, value) for name, value in right.items()}
            for right in (layer, step, call)
        )
        kernels = GpuKernels()
        prepared = kernels.prepare(move(LayerSpec(**layer_)))
        plan = kernels.plan(move(Step(**step_)), prepared.spec.plan_geometry(16))
        prepared.attend(*(move(value) for value in call_.values()), plan)

    attend({})
    with pytest.raises(KernelError):
        attend(wrong)


@needs_kernels
@pytest.mark.parametrize("place", ["query", "key", "value"])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_nan_in_nan_out(place: str, reconstruct: bool) -> None:
    """As `tests/kernels/test_nan.py`, for decode and prefill; other sequences keep their bits."""
    case = Case(rank_k=20, rank_v=17, sequences=((140, 1), (5, 30)), reconstruct=reconstruct)
    found, clean, reached = with_nan(case, place)
    assert bool(found.isnan().any(dim=2)[reached].all())
    assert torch.equal(found[:, 0], clean[:, 0])
    if place != "value":  # Times a probability of zero it is a NaN still.
        assert torch.equal(found[~reached], clean[~reached])


@pytest.mark.skipif(not HAS_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("reconstruct", [False, True])
@pytest.mark.parametrize("queries", [1, 16])
def test_replays_in_a_cuda_graph_with_other_lengths(queries: int, reconstruct: bool) -> None:
    case = Case(
        queries_per_head=4,
        rank_k=40,
        rank_v=24,
        sequences=((900, queries), (30, queries)),
        reconstruct=reconstruct,
    )
    others = ((700, queries), (4, queries))
    long, short = make(case), make(dataclasses.replace(case, sequences=others))
    kernels = GpuKernels()
    layer = kernels.prepare(move(layer_of(long)))
    step = move(dataclasses.replace(step_of(long), max_query_len=queries))
    plan = kernels.plan(step, layer.spec.plan_geometry(16))
    cache = torch.randn(long.num_blocks, 2, 16, 64, device="cuda")
    output = torch.empty(2 * queries, 8, 24, device="cuda")
    arguments = move(long.query[: 2 * queries]), cache, output, plan
    layer.attend(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.attend(*arguments)
    step.seq_lens.copy_(short.seq_lens)
    graph.replay()
    replayed = output.clone()
    layer.attend(*arguments)
    assert torch.equal(replayed, output)
