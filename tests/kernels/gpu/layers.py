# SPDX-License-Identifier: Apache-2.0
"""Layers of every kind that the GPU kernels serve, and steps of every kind that they are given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels import (
    DownProjection,
    KeyReconstruction,
    LayerSpec,
    Limits,
    RotaryTable,
    ScoreOptions,
    Step,
)

HEADS, KV_HEADS, HEAD_SIZE, BLOCK = 6, 3, 64, 64
LIMITS = Limits(256, 131_072, torch.device("cpu"))


def plain(rank_k: int, rank_v: int, **options: Any) -> LayerSpec:
    """A layer of bfloat16 without anything special."""
    defaults = {"dtype": torch.bfloat16, "cache_dtype": torch.bfloat16}
    scores = ScoreOptions(0.1)
    return LayerSpec(HEADS, KV_HEADS, rank_k, rank_v, **{"scores": scores, **defaults, **options})


def _reconstruction(rank_k: int) -> KeyReconstruction:
    rotary = RotaryTable.from_frequencies(torch.rand(HEAD_SIZE // 2), 256)
    basis = torch.zeros(KV_HEADS, rank_k, HEAD_SIZE, dtype=torch.bfloat16)
    return KeyReconstruction(basis, rotary)


def _projection(rank_k: int, rank_v: int | None) -> DownProjection:
    key, value = (
        None if rank is None else torch.zeros(KV_HEADS, HEAD_SIZE, rank, dtype=torch.bfloat16)
        for rank in (rank_k, rank_v)
    )
    assert key is not None
    return DownProjection(key, value)


def _coded(key: Code, value: Code, **options: Any) -> LayerSpec:
    return plain(
        key.rank, value.rank, cache_dtype=torch.uint8, key_code=key, value_code=value, **options
    )


CODE = Code(eight=4, four=40, two=16, token_scale=True)
LAYERS = {
    "numbers": plain(40, 48),
    "odd ranks": plain(33, 17),
    "fp8": plain(40, 48, cache_dtype=torch.uint8),
    "reconstructed": plain(40, 48, reconstruction=_reconstruction(40)),
    "projected": plain(40, 48, down_projection=_projection(40, 48)),
    "projected keys": plain(40, 48, down_projection=_projection(40, None)),
    "window and slopes": plain(
        40, 48, scores=ScoreOptions(0.1, torch.rand(HEADS), sliding_window=1024, soft_cap=3.0)
    ),
    "codes": _coded(CODE, CODE),
    "codes, reconstructed": _coded(CODE, CODE, reconstruction=_reconstruction(CODE.rank)),
    "codes, projected": _coded(CODE, CODE, down_projection=_projection(CODE.rank, CODE.rank)),
}


def batches() -> Iterator[tuple[list[int], list[int]]]:
    """Cached tokens and queries of each sequence: decode, speculation, prompts, and all mixed."""
    yield [1], [1]
    yield [131_000], [1]
    for count in (3, 16, 255, 256):
        yield [1000 + i for i in range(count)], [1] * count
    yield [131_000] + [1000] * 255, [1] * 256  # In parts, for the workspace has no room.
    yield [700] * 5, [3] * 5
    yield [700, 20, 131_000], [16, 1, 9]
    yield [17], [17]
    yield [4000], [1024]
    yield [90_000, 5, 2000, 1], [1, 5, 999, 1]


def _rows(count: int, heads: int, size: int, dtype: torch.dtype, shift: int) -> torch.Tensor:
    """`[count, heads, size]` as columns of a wider product; `shift` moves where they begin."""
    wide = torch.zeros(count, heads * size + shift, dtype=dtype)
    return wide[:, shift:].unflatten(1, (heads, size))


@dataclass(frozen=True)
class Inputs:
    """Tensors of one step of one layer."""

    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    slots: torch.Tensor
    query: torch.Tensor
    output: torch.Tensor
    step: Step


def inputs(spec: LayerSpec, lengths: list[int], queries: list[int], shift: int = 0) -> Inputs:
    """One step, whose tensors begin `shift` elements behind the start of their buffers."""
    count, tokens = len(lengths), sum(queries)
    starts = torch.tensor([0] * shift + [0, *itertools.accumulate(queries)], dtype=torch.int32)
    tables = torch.zeros(count + shift, LIMITS.max_seq_len // BLOCK + shift, dtype=torch.int32)
    width = spec.key_width + spec.value_width
    cache = torch.zeros(3, KV_HEADS + shift, BLOCK, width, dtype=spec.cache_dtype)[:, :KV_HEADS]
    key, value = (_rows(tokens, KV_HEADS, size, spec.dtype, shift) for size in spec.written_sizes)
    return Inputs(
        key=key,
        value=value,
        cache=cache,
        slots=torch.zeros(tokens + shift, dtype=torch.int64)[shift:],
        query=_rows(tokens, HEADS, spec.query_size, spec.dtype, shift),
        output=_rows(tokens, HEADS, spec.rank_v, spec.dtype, shift),
        step=Step(
            query_start_loc=starts[shift:],
            seq_lens=torch.tensor([0] * shift + lengths, dtype=torch.int32)[shift:],
            block_table=tables[shift:],
            num_actual_tokens=tokens,
            max_query_len=max(queries),
            max_seq_len=max(lengths),
            query_start_loc_cpu=starts[shift:],
        ),
    )
