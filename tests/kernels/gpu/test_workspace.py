# SPDX-License-Identifier: Apache-2.0
"""What a step launches; the GPU kernels' workspace is bounded, shared by all layers, and allocated
before the first step.

Kernels are not run here: launches are recorded in their place. `test_kernels.py` runs them.
"""

from __future__ import annotations

import dataclasses
import itertools
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.gpu.forbids import Forbids
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels import Limits, PlanGeometry, ScoreOptions, Step
from vllm_eigen.kernels.gpu import workspace
from vllm_eigen.kernels.gpu.workspace import Workspace
from vllm_eigen.kernels.interface import LayerSpec

pytest.importorskip("triton")

BOUND = 256 << 20


@settings(deadline=None, derandomize=True)
@given(
    num_seqs=st.integers(1, 300),
    rows=st.tuples(st.integers(1, 16), st.integers(1, 64), st.integers(2, 128)),
    width=st.sampled_from([16, 48, 128, 256]),
)
def test_parts_cover_all_sequences_within_the_bound(
    num_seqs: int, rows: tuple[int, int, int], width: int
) -> None:
    made = Workspace()
    made.reserve(num_seqs, rows, width, "meta")
    reserved = made.num_bytes
    assert reserved <= workspace.MAX_BYTES < BOUND
    end = 0
    for part, partials in made.parts(num_seqs, rows, width, "meta"):
        assert part.start == end < part.stop
        end = part.stop
        size = part.stop - part.start
        assert part.start % workspace.ALIGNED_SEQS == 0 or size < workspace.ALIGNED_SEQS
        shape = (size, *rows)
        assert partials.acc.shape == (*shape, width)
        assert partials.row_max.shape == partials.row_sum.shape == shape
        begins = [
            view.storage_offset() for view in (partials.acc, partials.row_max, partials.row_sum)
        ]
        assert begins == [0, prod(shape) * width, prod(shape) * (width + 1)]
        assert 4 * prod(shape) * (width + 2) <= reserved
    assert end == num_seqs
    assert made.num_bytes == reserved


def test_what_the_mode_forbids() -> None:
    rows = torch.zeros(3)
    with Forbids():
        rows[1:].view(2, 1)
        for call in (lambda: torch.empty(2), lambda: rows[0].item(), lambda: rows + 1, rows.clone):
            with pytest.raises(AssertionError, match="is called in a step"):
                call()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """What is launched: the kernel (decode and prefill are one), its grid, and the addresses of its
    tensors."""
    from vllm_eigen.kernels.gpu import kernels, layer
    from vllm_eigen.kernels.gpu.coded import layer as coded_layer

    recorded: list[tuple[str, tuple[Any, ...]]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, is_decode: bool | None = None, **_: Any) -> None:
                name = {None: self.name, True: "decode", False: "prefill"}[is_decode]
                addresses = [a.data_ptr() if torch.is_tensor(a) else a for a in arguments]
                recorded.append((name, (grid, *addresses)))

            return launch

    for module, name in itertools.product((layer, coded_layer), dir(layer) + dir(coded_layer)):
        if name.endswith("_kernel") and hasattr(module, name):
            monkeypatch.setattr(module, name, Recorder(name))
    monkeypatch.setattr(kernels, "_INTERPRETED", True)
    return recorded


def _spec(coded: bool) -> LayerSpec:
    code = Code(eight=8, four=8, two=16) if coded else None
    return LayerSpec(
        num_heads=32,
        num_kv_heads=8,
        rank_k=32 if coded else 77,
        rank_v=32 if coded else 128,
        dtype=torch.bfloat16,
        cache_dtype=torch.uint8 if coded else torch.bfloat16,
        scores=ScoreOptions(0.1),
        key_code=code,
        value_code=code,
    )


def _step(lengths: list[int], queries: list[int], block_size: int, max_model_len: int) -> Step:
    starts = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
    return Step(
        query_start_loc=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.zeros(len(lengths), max_model_len // block_size, dtype=torch.int32),
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=max_model_len,
    )


@pytest.mark.parametrize("coded", [False, True], ids=("numbers", "codes"))
@pytest.mark.parametrize("prefill", [1, 16, 700], ids=lambda n: f"{n}-queries")
def test_256_sequences_with_one_of_131k_tokens(
    coded: bool, prefill: int, launches: list[tuple[str, tuple[Any, ...]]]
) -> None:
    from vllm_eigen.kernels.gpu.kernels import GpuKernels

    block, longest, num_seqs = 64, 131_072, 256
    kernels, spec = GpuKernels(), _spec(coded)
    prepared = kernels.prepare(spec)
    kernels.reserve(Limits(num_seqs, longest, torch.device("cpu")), [prepared])
    assert 0 < kernels.workspace.num_bytes < BOUND
    buffer = kernels.workspace._buffer
    assert buffer is not None
    step = _step([longest] + [1000] * (num_seqs - 1), [prefill] + [1] * 255, block, longest)
    geometry: PlanGeometry = spec.plan_geometry(block)
    plan = kernels.plan(step, geometry)
    tokens = step.num_actual_tokens
    cache = torch.zeros(2, 8, block, spec.key_width + spec.value_width, dtype=spec.cache_dtype)
    query = torch.zeros(tokens, 32, spec.query_size, dtype=spec.dtype)
    key = torch.zeros(tokens, 8, spec.rank_k, dtype=spec.dtype)
    value = torch.zeros(tokens, 8, spec.rank_v, dtype=spec.dtype)
    output = torch.zeros(tokens, 32, spec.rank_v, dtype=spec.dtype)
    slots = torch.zeros(tokens, dtype=torch.int64)
    runs = []
    for _ in range(2):
        launches.clear()
        with Forbids():
            prepared.write_cache(key, value, cache, slots)
            prepared.attend(query, cache, output, plan)
        runs.append(list(launches))
    assert runs[0] == runs[1], "a replay would read other addresses"
    assert kernels.workspace._buffer is buffer
    decoded = [call for name, call in runs[0] if name.startswith("combine")]
    # Rows of 32 numbers and one query fit at once.
    assert len(decoded) > 1 or (coded and prefill == 1)
    assert sum(grid[1] for grid, *_ in decoded) == num_seqs


@pytest.mark.parametrize("coded", [False, True], ids=("numbers", "codes"))
@pytest.mark.parametrize("on_host", [False, True], ids=("bound", "on-host"))
@pytest.mark.parametrize(
    ("queries", "decoded", "is_prefilled"),
    [
        ([1, 1, 1], 1, False),
        ([4, 1, 0], 4, False),
        ([1, 5, 2], 5, False),
        ([16, 16, 16], 16, False),
        ([17, 17, 17], 0, True),
        ([300, 1, 1], 1, True),
        ([1, 16, 17], 16, True),
    ],
    ids=str,
)
def test_up_to_16_queries_are_decoded(
    coded: bool,
    on_host: bool,
    queries: list[int],
    decoded: int,
    is_prefilled: bool,
    launches: list[tuple[str, tuple[Any, ...]]],
) -> None:
    """A tile of decode has 4 queries of 4 heads. Beside a prompt all 16 have room, unless the host
    knows how many queries sequences have."""
    from vllm_eigen.kernels.gpu.kernels import GpuKernels

    kernels, spec = GpuKernels(), _spec(coded)
    prepared = kernels.prepare(spec)
    assert prepared.decode.block_m // prepared.decode_heads == 4
    step = _step([8000, 3000, 2000], queries, 64, 8192)
    if on_host:
        step = dataclasses.replace(step, query_start_loc_cpu=step.query_start_loc)
    tokens, width = sum(queries), spec.key_width + spec.value_width
    cache = torch.zeros(2, 8, 64, width, dtype=spec.cache_dtype)
    query = torch.zeros(tokens, 32, spec.query_size, dtype=spec.dtype)
    output = torch.zeros(tokens, 32, spec.rank_v, dtype=spec.dtype)
    prepared.attend(query, cache, output, kernels.plan(step, spec.plan_geometry(64)))
    grids = {name: grid for name, (grid, *_) in launches}
    assert len(grids) == len(launches)
    slots = 16 if is_prefilled and not on_host else decoded
    assert ("prefill" in grids) == is_prefilled
    assert grids.get("decode") == ((-(-slots // 4) * 8, 3, 16) if slots else None)
    assert grids.get("combine_splits_kernel") == ((32, 3, slots) if slots else None)


def test_layers_share_one_buffer(launches: list[tuple[str, tuple[Any, ...]]]) -> None:
    from vllm_eigen.kernels.gpu.kernels import GpuKernels

    kernels = GpuKernels()
    wide = _spec(False)
    layers = [kernels.prepare(dataclasses.replace(wide, rank_v=rank)) for rank in (16, 128, 60)]
    limits = Limits(4, 8192, torch.device("cpu"))
    for layer in layers:
        kernels.reserve(limits, [layer])
    buffer = kernels.workspace._buffer
    assert buffer is not None
    rows = kernels.tuning.max_decode * wide.num_heads * 8192 // kernels.tuning.decode_split
    assert buffer.numel() == 4 * rows * (128 + 2)
    kernels.reserve(limits, layers)
    assert kernels.workspace._buffer is buffer
