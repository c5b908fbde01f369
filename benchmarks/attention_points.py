"""What the attention benchmark measures: points of a grid, their inputs and one call of each side.

Used by `attention.py`. Both sides get a batch of the same shape: vLLM's CPU_ATTN at the full head
size, ours at the point's ranks. vLLM's scheduler metadata is built outside the timed call, as
vLLM builds it once per step for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vllm_eigen.kernels import Kernels, Rebuild, ScoreOptions
from vllm_eigen.kernels.planes import latent_order, staircase
from vllm_eigen.kernels.reference import ReferenceKernels

BLOCK_SIZE = 128
ROTARY_BASE = 10_000.0
CHECKED_TOKENS = 8  # last query tokens of a sequence that are checked against float64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 1.5e-2, "fp16": 2e-3, "fp32": 2e-5}


@dataclass(frozen=True)
class Point:
    """One cell of the grid. kv_ratio is (rank_k + rank_v) / (2 * head_size)."""

    heads: int
    kv_heads: int
    rank_k: int
    rank_v: int
    key_mode: str = "folded"  # folded | pre-rope | post-rope
    phase: str = "decode"  # decode | prefill
    context: int = 4096
    batch: int = 4
    dtype: str = "bf16"
    threads: int = 1
    head_size: int = 128

    @property
    def kv_ratio(self) -> float:
        """Bytes kept, of the full head size."""
        return (self.rank_k + self.rank_v) / (2 * self.head_size)

    @property
    def query_tokens(self) -> int:
        """Of each sequence: one, or the whole prompt."""
        return 1 if self.phase == "decode" else self.context

    @property
    def cache_bytes(self) -> int:
        """Latents that one call reads at least once."""
        per_token = self.kv_heads * (self.rank_k + self.rank_v) * DTYPES[self.dtype].itemsize
        return self.batch * self.context * per_token


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
                yield Point(heads, 8, rank_k, rank_v, "pre-rope", threads=threads)
            for key_mode in ("folded", "pre-rope"):
                yield Point(heads, 8, 77, 77, key_mode, "prefill", 2048, 1, threads=threads)
    yield Point(32, 8, 96, 96, "post-rope")
    for context in (512, 2048, 8192, 16384):
        yield Point(8, 8, 77, 77, context=context)
    for rank in (32, 51, 64, 90, 102, 115):
        yield Point(8, 8, rank, rank)


def full() -> Iterator[Point]:
    """Heads x ratio x mode x phase x context x batch x dtype x threads."""
    yield from quick()
    for heads, kv_heads in ((8, 8), (32, 8)):
        for ratio in (0.4, 0.5, 0.6, 0.7, 0.8, 1.0):
            rank = round(128 * ratio)
            for key_mode in ("folded", "pre-rope", "post-rope"):
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
                yield Point(heads, kv_heads, 77, 77, "folded", phase, context, batch, dtype)


def eigen_side(kernels: Kernels, point: Point, generator: torch.Generator) -> Side:
    """Our kernels on random latents."""
    dtype = DTYPES[point.dtype]
    rebuild = _rebuild(point, generator) if point.key_mode == "pre-rope" else None
    query_size = point.head_size if rebuild else point.rank_k
    options = ScoreOptions(scale=1.0 / math.sqrt(point.head_size))
    batch = _Batch(point, query_size, point.rank_k, point.rank_v, generator)
    shape = (batch.num_blocks, point.kv_heads, BLOCK_SIZE, point.rank_k + point.rank_v)
    kv_cache = torch.zeros(shape, dtype=dtype)
    for i in range(point.batch):
        kernels.write_cache(*batch.latents(i), kv_cache, batch.slots(i))
    output = torch.empty(batch.query.shape[0], point.heads, point.rank_v, dtype=dtype)
    tables = (batch.query_start_loc, batch.seq_lens, batch.block_table)

    def call() -> None:
        kernels.attend(batch.query, kv_cache, output, *tables, options, rebuild)

    return Side(call, lambda: _relative_error(batch, output, options, rebuild))


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
        seq_lens=batch.seq_lens,
        dtype=dtype,
        query_start_loc=batch.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
    )
    options = ScoreOptions(scale=1.0 / math.sqrt(size))

    def call() -> None:
        ops.cpu_attention_with_kv_cache(
            query=batch.query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            scale=options.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.block_table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )

    return Side(call, lambda: _relative_error(batch, output, options, None))


class _Batch:
    """Random queries, keys and values of a batch of equal sequences, in shuffled blocks."""

    def __init__(
        self, point: Point, query_size: int, rank_k: int, rank_v: int, generator: torch.Generator
    ) -> None:
        self.point = point
        self.ranks = (rank_k, rank_v)
        self.seed = int(torch.randint(2**31, (1,), generator=generator))
        dtype, tokens = DTYPES[point.dtype], point.query_tokens
        query = torch.randn(point.batch * tokens, point.heads, query_size, generator=generator)
        self.query = query.to(dtype)
        blocks = -(-point.context // BLOCK_SIZE)
        self.num_blocks = point.batch * blocks
        order = torch.randperm(self.num_blocks, generator=generator)
        self.block_table = order.int().view(point.batch, blocks)
        starts = torch.arange(0, point.batch * tokens + 1, tokens)
        self.query_start_loc = starts.int()
        self.seq_lens = torch.full((point.batch,), point.context, dtype=torch.int32)

    def latents(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sequence i, the same at every call."""
        generator = torch.Generator().manual_seed(self.seed + i)
        shape = (self.point.context, self.point.kv_heads)
        dtype = DTYPES[self.point.dtype]
        key, value = (
            torch.randn(*shape, rank, generator=generator).to(dtype) for rank in self.ranks
        )
        return key, value

    def slots(self, i: int) -> torch.Tensor:
        """Where sequence i's tokens lie."""
        token = torch.arange(self.point.context)
        return self.block_table[i, token // BLOCK_SIZE].long() * BLOCK_SIZE + token % BLOCK_SIZE


def _rebuild(point: Point, generator: torch.Generator) -> Rebuild:
    basis = torch.randn(point.kv_heads, point.rank_k, point.head_size, generator=generator)
    # As calibration writes it.
    _, basis = staircase(basis, latent_order(point.head_size, point.head_size, heads=1))
    half = point.head_size // 2
    frequency = ROTARY_BASE ** (-torch.arange(half) / half)
    angle = torch.arange(point.context)[:, None] * frequency
    return Rebuild(
        key_basis=(basis / math.sqrt(point.rank_k)).to(DTYPES[point.dtype]),
        cos_sin=torch.cat([angle.cos(), angle.sin()], dim=-1),
        rotary_dim=point.head_size,
    )


def _relative_error(
    batch: _Batch, output: torch.Tensor, options: ScoreOptions, rebuild: Rebuild | None
) -> float:
    """|output - exact| / |exact| over KV head 0 and the last tokens of the last sequence."""
    point = batch.point
    tokens = min(CHECKED_TOKENS, point.query_tokens)
    group = point.heads // point.kv_heads
    reference = ReferenceKernels()
    key, value = (rows[:, :1].double() for rows in batch.latents(point.batch - 1))
    width = sum(batch.ranks)
    blocks = batch.block_table.shape[1]
    kv_cache = torch.zeros(blocks, 1, BLOCK_SIZE, width, dtype=torch.float64)
    reference.write_cache(key, value, kv_cache, torch.arange(point.context))
    query = batch.query[-tokens:, :group].double()
    exact = torch.empty(tokens, group, batch.ranks[1], dtype=torch.float64)
    if rebuild is not None:
        rebuild = Rebuild(rebuild.key_basis[:1], rebuild.cos_sin, rebuild.rotary_dim)
    reference.attend(
        query,
        kv_cache,
        exact,
        torch.tensor([0, tokens], dtype=torch.int32),
        batch.seq_lens[-1:],
        torch.arange(blocks, dtype=torch.int32)[None],
        options,
        rebuild,
    )
    found = output[-tokens:, :group].double()
    return float((found - exact).norm() / exact.norm())
