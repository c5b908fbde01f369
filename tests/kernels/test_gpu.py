"""The Triton kernels against the float64 answer: on a GPU, or interpreted on the CPU.

Triton decides when a kernel is defined whether it will be interpreted. So without a GPU the first
test runs this file again in a process of its own, with TRITON_INTERPRET=1, and the others, outside
of it, are skipped.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_eigen.errors import KernelError
from vllm_eigen.kernels import ScoreOptions

from .cases import Case, expected, make, run, tolerance
from .strategies import cases

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
RUNS_HERE = HAS_GPU or INTERPRETED
SETTINGS = settings(
    deadline=None,
    max_examples=200 if HAS_GPU else 25,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
needs_kernels = pytest.mark.skipif(
    not RUNS_HERE, reason="no GPU: test_without_a_gpu runs it interpreted, in its own process"
)

if RUNS_HERE:
    from vllm_eigen.kernels.gpu import GpuKernels
    from vllm_eigen.kernels.triton_tiles import Tile, Tuning

    TUNINGS = (
        Tuning(),
        Tuning(decode_split=64),
        Tuning(
            decode=Tile(16, 32, 1, 3, swap=False),
            decode_rebuild=Tile(16, 32, 4, 3, swap=False),
            prefill=Tile(32, 32, 4, 3, swap=False),
            decode_split=32,
            share_latents=False,
        ),
        Tuning(relative_rotation=False, decode_split=128, max_decode=1),
    )


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_without_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-6000:]


class Moving:
    """The kernels, fed from the CPU: moves every argument to the GPU where there is one."""

    name = "gpu"

    def __init__(self, index: int = 0, hints: bool = False) -> None:
        self.inner = GpuKernels(TUNINGS[index])
        self.hints = hints

    def write_cache(self, key: Any, value: Any, kv_cache: Any, *rest: Any) -> None:
        moved = _move(kv_cache)
        self.inner.write_cache(_move(key), _move(value), moved, *map(_move, rest))
        if HAS_GPU:
            kv_cache.copy_(moved)

    def attend(self, query: Any, kv_cache: Any, output: Any, *rest: Any) -> None:
        starts, lengths = rest[0], rest[1]
        bounds = {}
        if self.hints:
            bounds = {
                "max_query_len": int((starts[1:] - starts[:-1]).max()),
                "max_seq_len": int(lengths.max()),
            }
        moved = _move(output)
        self.inner.attend(_move(query), _move(kv_cache), moved, *map(_move, rest), **bounds)
        if HAS_GPU:
            output.copy_(moved)


def _move(value: Any) -> Any:
    """A tensor, or a dataclass of them, where the kernels run."""
    if not HAS_GPU:
        return value
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _move(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def small(case: Case) -> Case:
    """The case, short enough for the interpreter."""
    if HAS_GPU:
        return case
    sequences = tuple((old % 190, (new - 1) % 40 + 1) for old, new in case.sequences[:3])
    return dataclasses.replace(case, sequences=sequences)


def close(case: Case, kernels: Moving) -> torch.Tensor:
    problem = make(case)
    found = run(kernels, problem, free_outside_window=True)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=tolerance(case))
    return found


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
def test_rebuilds_keys_of_a_group(dtype: torch.dtype, is_neox_style: bool) -> None:
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
        rebuild=True,
        rotary_dim=48,
        is_neox_style=is_neox_style,
        offset=True,
        alibi=True,
        soft_cap=3.0,
    )
    close(case, Moving(1))


@needs_kernels
@pytest.mark.parametrize("rebuild", [False, True])
def test_bounds_and_company_change_nothing(rebuild: bool) -> None:
    """A sequence gets the same bits alone, in a mixed batch, and with bounds from the host."""
    case = Case(
        queries_per_head=2,
        rank_k=20,
        rank_v=17,
        sequences=((140, 1), (0, 30), (90, 3)),
        rebuild=rebuild,
        rotary_dim=16,
        window=100,
    )
    problem = make(case)
    together = run(Moving(1), problem)
    assert torch.equal(together, run(Moving(1, hints=True), problem))
    alone = dataclasses.replace(
        problem,
        query=torch.cat([problem.query[:1], problem.query[-1:]]),
        keys=problem.keys[:1],
        values=problem.values[:1],
        query_start_loc=problem.query_start_loc[:2],
        seq_lens=problem.seq_lens[:1],
        block_table=problem.block_table[:1],
    )
    assert torch.equal(together[:1], run(Moving(1, hints=True), alone))


@needs_kernels
def test_another_rotary_table_is_read_as_it_is() -> None:
    """Positions that do not turn by equal angles cannot be split into start and offset."""
    case = Case(sequences=((100, 1),), rebuild=True)
    problem = make(case)
    assert problem.rebuild is not None
    bent = problem.rebuild.cos_sin.flip(0).contiguous()
    cos, sin = bent.double().numpy()[:, :4], bent.double().numpy()[:, 4:]
    rebuild = dataclasses.replace(problem.rebuild, cos_sin=bent)
    problem = dataclasses.replace(problem, rebuild=rebuild, rotary=(cos, sin))
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
    Moving().write_cache(numbers, numbers, cache, torch.arange(count), 1.0, 1.0)
    stored = cache.view(torch.uint8).view(-1, 16)[:count, 8:].view(cache_dtype).float()
    wanted = numbers[:, 0].clamp(-limit, limit).to(cache_dtype).float()
    assert torch.equal(stored, wanted)


@needs_kernels
@pytest.mark.parametrize("encodes_values", [True, False])
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.uint8])
def test_encodes_into_fp8(cache_dtype: torch.dtype, encodes_values: bool) -> None:
    """As torch rounds the float32 products, but for those beside the middle of two values."""
    case = Case(
        rank_k=20,
        rank_v=33,
        sequences=((90, 1),),
        encoded_size=48,
        encodes_values=encodes_values,
    )
    problem = make(case)
    [(key, value)] = problem.written
    cache = torch.zeros(6, 2, 16, 53, dtype=cache_dtype)
    slots = torch.arange(91)
    Moving().write_cache(key, value, cache, slots, 0.1, 0.02, problem.encode)
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
        {"options": ScoreOptions(1.0, alibi_slopes=torch.zeros(3))},
    ],
)
def test_refuses_what_does_not_fit(wrong: dict[str, Any]) -> None:
    right = {
        "query": torch.zeros(2, 2, 8),
        "kv_cache": torch.zeros(1, 2, 16, 16),
        "output": torch.zeros(2, 2, 8),
        "query_start_loc": torch.tensor([0, 2], dtype=torch.int32),
        "seq_lens": torch.tensor([2], dtype=torch.int32),
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "options": ScoreOptions(1.0),
    }
    right.update(wrong)
    with pytest.raises(KernelError):
        GpuKernels().attend(*(_move(value) for value in right.values()))


@pytest.mark.skipif(not HAS_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("rebuild", [False, True])
def test_replays_in_a_cuda_graph_with_other_lengths(rebuild: bool) -> None:
    case = Case(rank_k=40, rank_v=24, sequences=((900, 1), (30, 1)), rebuild=rebuild)
    long, short = make(case), make(dataclasses.replace(case, sequences=((700, 1), (4, 1))))
    kernels = GpuKernels()
    cache = torch.randn(long.num_blocks, 2, 16, 64, device="cuda")
    arguments = [_move(long.query[:2]), cache, torch.empty(2, 2, 24, device="cuda")]
    arguments += [_move(x) for x in (long.query_start_loc, long.seq_lens, long.block_table)]
    arguments += [_move(long.options), _move(long.rebuild)]
    kernels.attend(*arguments, max_query_len=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.attend(*arguments, max_query_len=1)
    arguments[4].copy_(short.seq_lens)
    graph.replay()
    replayed = arguments[2].clone()
    kernels.attend(*arguments, max_query_len=1)
    assert torch.equal(replayed, arguments[2])
