# SPDX-License-Identifier: Apache-2.0
"""What the attention benchmark measures: points of a grid, their inputs and one call of each side.

Used by `attention.py`. Both sides get a batch of the same shape: vLLM's CPU_ATTN at the full head
size, ours at the point's ranks. vLLM's scheduler metadata is built outside the timed call, as
vLLM builds it once per step for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.kernels import (
    Kernels,
    KeyReconstruction,
    LayerSpec,
    RotaryTable,
    ScoreOptions,
    Step,
)
from vllm_eigen.kernels.reference import ReferenceKernels
from vllm_eigen.kernels.rope import latent_order, triangular_order

BLOCK_SIZE = 128
ROTARY_BASE = 10_000.0
CHECKED_TOKENS = 8  # last query tokens of a sequence that are checked against float64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FOUR_BITS = (Code(four=128), Code(four=128, token_scale=True))
# Keys after RoPE take more bits to lose as little.
MIXED_BITS = (Code(eight=64, four=64), Code(four=128, token_scale=True))
TOLERANCE = {"bf16": 1.5e-2, "fp16": 2e-3, "fp32": 2e-5}


@dataclass(frozen=True)
class Point:
    """One cell of the grid. codes: of keys and values, None where they are numbers of `dtype`."""

    heads: int
    kv_heads: int
    rank_k: int
    rank_v: int
    key_mode: KeyMode = KeyMode.NO_ROPE
    phase: str = "decode"  # decode | prefill
    context: int = 4096
    batch: int = 4
    dtype: str = "bf16"
    threads: int = 1
    head_size: int = 128
    codes: tuple[Code, Code] | None = None

    @property
    def token_bytes(self) -> int:
        """Of one head's key and value."""
        if self.codes is not None:
            return sum(code.num_bytes for code in self.codes)
        return (self.rank_k + self.rank_v) * DTYPES[self.dtype].itemsize

    @property
    def kv_ratio(self) -> float:
        """Bytes kept, of the full head size."""
        return self.token_bytes / (2 * self.head_size * DTYPES[self.dtype].itemsize)

    @property
    def query_tokens(self) -> int:
        """Of each sequence: one, or the whole prompt."""
        return 1 if self.phase == "decode" else self.context

    @property
    def cache_bytes(self) -> int:
        """Latents that one call reads at least once."""
        return self.batch * self.context * self.kv_heads * self.token_bytes


@dataclass(frozen=True)
class Side:
    """One implementation, ready to call: `call()` fills `output`; `expected()` checks a part."""

    call: Callable[[], None]
    relative_error: Callable[[], float]


def quick() -> Iterator[Point]:
    """The points the project states targets for, and lines along context and rank."""
    for threads in (1, 2):
        for heads in (8, 32):
            for rank_k, rank_v in ((77, 77), (52, 102), (128, 128)):
                yield Point(heads, 8, rank_k, rank_v, threads=threads)
            for rank_k, rank_v in ((77, 77), (52, 102)):
                yield Point(heads, 8, rank_k, rank_v, KeyMode.PRE_ROPE, threads=threads)
            for key_mode in (KeyMode.NO_ROPE, KeyMode.PRE_ROPE):
                yield Point(heads, 8, 77, 77, key_mode, "prefill", 2048, 1, threads=threads)
    yield Point(32, 8, 96, 96, KeyMode.POST_ROPE)
    for context in (512, 2048, 8192, 16384):
        yield Point(8, 8, 77, 77, context=context)
    for rank in (32, 51, 64, 90, 102, 115):
        yield Point(8, 8, rank, rank)


def coded() -> Iterator[Point]:
    """Four bits folded and before RoPE, mixed widths after it; decode and prompt."""
    for threads in (1, 2):
        for heads in (8, 32):
            for key_mode, codes in (
                (KeyMode.NO_ROPE, FOUR_BITS),
                (KeyMode.POST_ROPE, MIXED_BITS),
                (KeyMode.PRE_ROPE, FOUR_BITS),
            ):
                ranks = (codes[0].rank, codes[1].rank)
                yield Point(heads, 8, *ranks, key_mode, threads=threads, codes=codes)
            for key_mode in (KeyMode.NO_ROPE, KeyMode.PRE_ROPE):
                yield Point(
                    *(heads, 8, 128, 128, key_mode, "prefill", 2048, 1),
                    threads=threads,
                    codes=FOUR_BITS,
                )


def full() -> Iterator[Point]:
    """Heads x ratio x mode x phase x context x batch x dtype x threads."""
    yield from quick()
    for heads, kv_heads in ((8, 8), (32, 8)):
        for ratio in (0.4, 0.5, 0.6, 0.7, 0.8, 1.0):
            rank = round(128 * ratio)
            for key_mode in KeyMode:
                for threads in (1, 2):
                    for context, batch in ((512, 1), (512, 32), (4096, 1), (32768, 1), (131072, 1)):
                        yield Point(
                            *(heads, kv_heads, rank, rank, key_mode),
                            context=context,
                            batch=batch,
                            threads=threads,
                        )
                yield Point(heads, kv_heads, rank, rank, key_mode, "prefill", 4096, 1)
        for dtype in ("fp16", "fp32"):
            for phase, context, batch in (("decode", 4096, 4), ("prefill", 1024, 1)):
                yield Point(heads, kv_heads, 77, 77, KeyMode.NO_ROPE, phase, context, batch, dtype)


def eigen_side(kernels: Kernels, point: Point, generator: torch.Generator) -> Side:
    """Our kernels on random latents."""
    spec = _layer(point, generator)
    layer = kernels.prepare(spec)
    batch = _Batch(point, spec.query_size, point.rank_k, point.rank_v, generator, point.codes)
    shape = (batch.num_blocks, point.kv_heads, BLOCK_SIZE, spec.key_width + spec.value_width)
    kv_cache = torch.zeros(shape, dtype=spec.cache_dtype)
    for i in range(point.batch):
        layer.write_cache(*batch.latents(i), kv_cache, batch.slots(i))
    output = torch.empty(batch.query.shape[0], point.heads, point.rank_v, dtype=spec.dtype)
    # Once a step for all layers, as vLLM's scheduler metadata below.
    plan = kernels.plan(batch.step, spec.plan_geometry(BLOCK_SIZE))

    def call() -> None:
        layer.attend(batch.query, kv_cache, output, plan)

    return Side(call, lambda: _relative_error(batch, output, spec))


def _layer(point: Point, generator: torch.Generator) -> LayerSpec:
    reconstructs = point.key_mode.reconstructs_keys
    codes = point.codes or (None, None)
    scale = 1.0 / math.sqrt(point.head_size)
    if codes[0] is not None:
        scale /= float(_sizes(codes[0]).square().mean().sqrt())  # logits as large as vLLM's
    return LayerSpec(
        num_heads=point.heads,
        num_kv_heads=point.kv_heads,
        rank_k=point.rank_k,
        rank_v=point.rank_v,
        dtype=DTYPES[point.dtype],
        cache_dtype=torch.uint8 if point.codes else DTYPES[point.dtype],
        scores=ScoreOptions(scale),
        reconstruction=_reconstruction(point, generator) if reconstructs else None,
        key_code=codes[0],
        value_code=codes[1],
    )


def _sizes(code: Code | None) -> torch.Tensor:
    """Standard deviations of latents that use their codes well."""
    if code is None:
        return torch.ones(())
    return torch.tensor([2.0 ** (width - 1) / 3 for width in code.widths])


def vllm_side(point: Point, generator: torch.Generator) -> Side:
    """vLLM's CPU_ATTN operations on random keys and values of the full head size."""
    from vllm import _custom_ops as ops
    from vllm import envs
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    size, dtype = point.head_size, DTYPES[point.dtype]
    batch = _Batch(point, size, size, size, generator)
    isa = _get_attn_isa(dtype, BLOCK_SIZE, size, "auto")
    kv_cache = torch.zeros(batch.num_blocks, point.kv_heads, 2 * BLOCK_SIZE, size, dtype=dtype)
    key_cache, value_cache = kv_cache.chunk(2, dim=2)
    for i in range(point.batch):
        key, value = batch.latents(i)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, batch.slots(i), isa)
    output = torch.empty(batch.query.shape[0], point.heads, size, dtype=dtype)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=point.batch,
        num_heads=point.heads,
        num_kv_heads=point.kv_heads,
        head_dim=size,
        seq_lens=batch.step.seq_lens,
        dtype=dtype,
        query_start_loc=batch.step.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
    )
    scale = 1.0 / math.sqrt(size)
    step = batch.step

    def call() -> None:
        ops.cpu_attention_with_kv_cache(
            query=batch.query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=step.block_table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )

    spec = LayerSpec(
        point.heads,
        point.kv_heads,
        size,
        size,
        dtype,
        cache_dtype=dtype,
        scores=ScoreOptions(scale),
    )
    return Side(call, lambda: _relative_error(batch, output, spec))


class _Batch:
    """Random queries, keys and values of a batch of equal sequences, in shuffled blocks."""

    def __init__(
        self,
        point: Point,
        query_size: int,
        rank_k: int,
        rank_v: int,
        generator: torch.Generator,
        codes: tuple[Code, Code] | None = None,
    ) -> None:
        self.point = point
        self.ranks = (rank_k, rank_v)
        self.sizes = [_sizes(code) for code in codes or (None, None)]
        self.seed = int(torch.randint(2**31, (1,), generator=generator))
        dtype, tokens = DTYPES[point.dtype], point.query_tokens
        query = torch.randn(point.batch * tokens, point.heads, query_size, generator=generator)
        self.query = query.to(dtype)
        blocks = -(-point.context // BLOCK_SIZE)
        self.num_blocks = point.batch * blocks
        order = torch.randperm(self.num_blocks, generator=generator)
        self.step = Step(
            query_start_loc=torch.arange(0, point.batch * tokens + 1, tokens).int(),
            seq_lens=torch.full((point.batch,), point.context, dtype=torch.int32),
            block_table=order.int().view(point.batch, blocks),
            num_actual_tokens=point.batch * tokens,
        )

    def latents(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sequence i, the same at every call."""
        generator = torch.Generator().manual_seed(self.seed + i)
        shape = (self.point.context, self.point.kv_heads)
        dtype = DTYPES[self.point.dtype]
        key, value = (
            (torch.randn(*shape, rank, generator=generator) * size).to(dtype)
            for rank, size in zip(self.ranks, self.sizes, strict=True)
        )
        return key, value

    def slots(self, i: int) -> torch.Tensor:
        """Where sequence i's tokens lie."""
        token = torch.arange(self.point.context)
        blocks = self.step.block_table[i].long()
        return blocks[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE


def _reconstruction(point: Point, generator: torch.Generator) -> KeyReconstruction:
    basis = torch.randn(point.kv_heads, point.rank_k, point.head_size, generator=generator)
    if point.codes is None:
        # As calibration writes it; codes leave latents no freedom to be turned so.
        _, basis = triangular_order(basis, latent_order(point.head_size, point.head_size, heads=1))
    half = point.head_size // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half) / half)
    return KeyReconstruction(
        key_basis=(basis / math.sqrt(point.rank_k)).to(DTYPES[point.dtype]),
        rotary=RotaryTable.from_frequencies(frequencies, point.context),
    )


def _relative_error(batch: _Batch, output: torch.Tensor, spec: LayerSpec) -> float:
    """|output - exact| / |exact| over KV head 0 and the last tokens of the last sequence."""
    point = batch.point
    tokens = min(CHECKED_TOKENS, point.query_tokens)
    group = point.heads // point.kv_heads
    reference = ReferenceKernels()
    reconstruction = spec.reconstruction
    if reconstruction is not None:
        reconstruction = replace(reconstruction, key_basis=reconstruction.key_basis[:1])
    spec = replace(
        spec,
        num_heads=group,
        num_kv_heads=1,
        dtype=torch.float64,
        cache_dtype=spec.cache_dtype if spec.is_coded else torch.float64,
        reconstruction=reconstruction,
    )
    layer = reference.prepare(spec)
    key, value = (rows[:, :1].double() for rows in batch.latents(point.batch - 1))
    blocks = batch.step.block_table.shape[1]
    shape = (blocks, 1, BLOCK_SIZE, spec.key_width + spec.value_width)
    kv_cache = torch.zeros(shape, dtype=spec.cache_dtype)
    layer.write_cache(key, value, kv_cache, torch.arange(point.context))
    query = batch.query[-tokens:, :group].double()
    exact = torch.empty(tokens, group, batch.ranks[1], dtype=torch.float64)
    step = Step(
        query_start_loc=torch.tensor([0, tokens], dtype=torch.int32),
        seq_lens=batch.step.seq_lens[-1:],
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        num_actual_tokens=tokens,
    )
    layer.attend(query, kv_cache, exact, reference.plan(step, spec.plan_geometry(BLOCK_SIZE)))
    found = output[-tokens:, :group].double()
    return float((found - exact).norm() / exact.norm())
