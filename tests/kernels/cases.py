"""Random attention problems, their answer in float64 written out directly, and a way to run them.

The answer shares no code with `vllm_eigen.kernels`: one query token and head at a time, dense
softmax, latents as the cache stores them (rounded to its dtype).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_eigen.kernels import Encode, Kernels, Rebuild, ScoreOptions
from vllm_eigen.kernels.planes import plane_order

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One batch. `sequences` holds (tokens already cached, new tokens) of each."""

    num_kv_heads: int = 2
    group: int = 1  # rebuilt heads a latent head serves (1 without rebuild)
    queries_per_head: int = 1
    rank_k: int = 8
    rank_v: int = 8
    block_size: int = 16
    sequences: tuple[tuple[int, int], ...] = ((0, 5),)
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    head_size: int = 16
    rebuild: bool = False
    rotary_dim: int = 8
    rope_base: float | None = None  # None: planes of random speeds, a table of the case's dtype
    is_neox_style: bool = True
    staircase: bool = False  # the j-th dimension, planes in their order, reads j + 1 latents
    offset: bool = False
    alibi: bool = False
    window: int | None = None
    soft_cap: float | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    encoded_size: int = 0  # width of what is encoded when written; 0 writes latents
    encodes_values: bool = True  # or keys alone
    seed: int = 0

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group * self.queries_per_head

    @property
    def query_size(self) -> int:
        return self.head_size if self.rebuild else self.rank_k


@dataclass
class Problem:
    """A case with its tensors. Latents are per sequence `[seq_len, num_kv_heads, rank]`.

    With `encode`, `written` holds the keys and values of each sequence that it makes them of.
    """

    case: Case
    query: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    options: ScoreOptions
    rebuild: Rebuild | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_blocks: int
    rotary: tuple[Array, Array] = field(default=(np.zeros(0), np.zeros(0)))
    written: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    encode: Encode | None = None


def make(case: Case) -> Problem:
    """The case's tensors, from its seed."""
    rng = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    lengths = [old + new for old, new in case.sequences]
    starts = np.cumsum([0] + [new for _, new in case.sequences])
    spread = 1.0 / math.sqrt(case.query_size)
    blocks = [-(-length // case.block_size) for length in lengths]
    num_blocks = sum(blocks) + 2
    order = torch.randperm(num_blocks, generator=rng)
    # Entries past a sequence's blocks are never read: point them outside.
    table = torch.full((len(lengths), max(blocks) + 1), 2**30, dtype=torch.int32)
    taken = 0
    for row, count in zip(table, blocks, strict=True):
        row[:count] = order[taken : taken + count]
        taken += count
    rebuild, rotary = None, (np.zeros(0), np.zeros(0))
    if case.rebuild:
        heads = case.num_kv_heads * case.group
        positions = max(lengths) + 3
        planes, digits = case.rotary_dim // 2, case.dtype
        speeds = torch.rand(planes, generator=rng).double()
        if case.rope_base is not None:
            # As models have it, in float32 whatever their dtype: the kernels need not rebuild all.
            speeds, digits = case.rope_base ** -(torch.arange(planes) / planes), torch.float32
        angles = torch.arange(positions)[:, None] * speeds.double()
        cos, sin = angles.cos().to(digits), angles.sin().to(digits)
        rotary = (cos.double().numpy(), sin.double().numpy())
        basis = normal(heads, case.rank_k, case.head_size) / math.sqrt(case.rank_k)
        if case.staircase:
            order = plane_order(case.head_size, case.rotary_dim, case.is_neox_style)
            for read, dimension in enumerate(order[: case.head_size], start=1):
                basis[:, read:, dimension] = 0.0
        rebuild = Rebuild(
            key_basis=basis.to(case.dtype),
            cos_sin=torch.cat([cos, sin], dim=-1),
            rotary_dim=case.rotary_dim,
            is_neox_style=case.is_neox_style,
            key_offset=normal(heads, case.head_size) * 0.3 if case.offset else None,
        )
    keys = [normal(n, case.num_kv_heads, case.rank_k).to(case.dtype) for n in lengths]
    values = [normal(n, case.num_kv_heads, case.rank_v).to(case.dtype) for n in lengths]
    written, encode = [], None
    if size := case.encoded_size:
        bases = [
            (normal(case.num_kv_heads, size, rank) / math.sqrt(size)).to(case.dtype)
            for rank in (case.rank_k, case.rank_v)
        ]
        wholes = [normal(n, case.num_kv_heads, size).to(case.dtype) for n in 2 * lengths]
        count = len(lengths)
        keys = [_through(rows, bases[0]).to(case.dtype) for rows in wholes[:count]]
        if case.encodes_values:
            values = [_through(rows, bases[1]).to(case.dtype) for rows in wholes[count:]]
        encode = Encode(bases[0], bases[1] if case.encodes_values else None)
        of_values = wholes[count:] if case.encodes_values else values
        written = list(zip(wholes[:count], of_values, strict=True))
    return Problem(
        case=case,
        query=normal(int(starts[-1]) + 1, case.num_heads, case.query_size).to(case.dtype),
        keys=keys,
        values=values,
        options=ScoreOptions(
            scale=1.5 * spread,
            alibi_slopes=torch.rand(case.num_heads, generator=rng) if case.alibi else None,
            sliding_window=case.window,
            soft_cap=case.soft_cap,
        ),
        rebuild=rebuild,
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        num_blocks=num_blocks,
        rotary=rotary,
        written=written,
        encode=encode,
    )


def _through(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Rows `[n, heads, size]` times `[heads, size, rank]`, in float64."""
    return torch.from_numpy(np.einsum("nhs,hsr->nhr", rows.double(), basis.double()))


def run(kernels: Kernels, problem: Problem, *, free_outside_window: bool = False) -> torch.Tensor:
    """Write every sequence into a cache full of NaN, then attend; `[num_tokens, heads, rank_v]`.

    Blocks stand apart in memory, as when layers share a block. With `free_outside_window` blocks
    that no query can see hold NaN again, as after vLLM frees them.
    """
    case = problem.case
    dtype = case.cache_dtype or case.dtype
    width = case.rank_k + case.rank_v
    shape = (problem.num_blocks, case.num_kv_heads + 1, case.block_size, width)
    cache = poisoned(shape, dtype)[:, 1:]
    written = problem.written or list(zip(problem.keys, problem.values, strict=True))
    for row, (keys, values) in zip(problem.block_table, written, strict=True):
        positions = torch.arange(keys.shape[0])
        slots = row[positions // case.block_size].long() * case.block_size
        slots = slots + positions % case.block_size
        # Padding between real tokens, and more rows than slots.
        slots = torch.stack([slots, torch.full_like(slots, -1)], dim=1).flatten()
        keys, values = (rows.repeat_interleave(2, 0) for rows in (keys, values))
        keys, values = (torch.cat([rows, rows[:1]]) for rows in (keys, values))
        scales = case.k_scale, case.v_scale
        kernels.write_cache(keys, values, cache, slots, *scales, problem.encode)
    if free_outside_window and case.window is not None:
        nan = poisoned(shape, dtype)[:, 1:]
        for row, (old, _) in zip(problem.block_table, case.sequences, strict=True):
            freed = max(0, old - case.window + 1) // case.block_size
            cache.view(torch.uint8)[row[:freed].long()] = nan.view(torch.uint8)[0]
    output = torch.full((problem.query.shape[0], case.num_heads, case.rank_v), 7.0)
    output = output.to(case.dtype)
    kernels.attend(
        problem.query,
        cache,
        output,
        problem.query_start_loc,
        problem.seq_lens,
        problem.block_table,
        problem.options,
        problem.rebuild,
        case.k_scale,
        case.v_scale,
    )
    assert bool((output[-1] == 7.0).all()), "the padding row was written"
    return output[:-1]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory in which every number reads as NaN."""
    size = dtype.itemsize
    return (
        torch.full((*shape[:-1], shape[-1] * size), 0x7F, dtype=torch.uint8)
        .fill_(0x7F if size == 1 else 0xFF)
        .view(dtype)
    )


def expected(problem: Problem) -> Array:
    """The answer in float64, `[num_tokens, num_heads, rank_v]`."""
    case = problem.case
    outputs = []
    for i, (old, new) in enumerate(case.sequences):
        keys = stored(problem.keys[i], case, case.k_scale)
        values = stored(problem.values[i], case, case.v_scale)
        start = int(problem.query_start_loc[i])
        query = problem.query[start : start + new].double().numpy()
        heads = [
            _attend_one_head(problem, h, query[:, h], old, keys, values)
            for h in range(case.num_heads)
        ]
        outputs.append(np.stack(heads, axis=1))
    return np.concatenate(outputs)


def stored(latents: torch.Tensor, case: Case, scale: float) -> Array:
    """What the cache returns for latents written to it."""
    dtype = case.cache_dtype or case.dtype
    if dtype.itemsize > 1:
        return latents.to(dtype).double().numpy()
    if dtype == torch.uint8:
        dtype = torch.float8_e4m3fn
    limit = torch.finfo(dtype).max
    quantized = (latents.float() / torch.tensor(scale)).clamp(-limit, limit).to(dtype)
    return quantized.double().numpy() * scale


def _attend_one_head(
    problem: Problem, head: int, query: Array, old: int, keys: Array, values: Array
) -> Array:
    """Rows `[new, query_size]` of one head, at positions old.., dense softmax."""
    case, options = problem.case, problem.options
    rebuilt_head = head // case.queries_per_head
    latent_head = rebuilt_head // case.group
    key_at = np.arange(keys.shape[0])
    query_at = old + np.arange(query.shape[0])[:, None]
    seen_keys = keys[:, latent_head]
    if problem.rebuild is not None:
        seen_keys = _rotary_keys(problem, seen_keys, key_at, rebuilt_head)
    logits = query @ seen_keys.T * options.scale
    if case.soft_cap is not None:
        logits = case.soft_cap * np.tanh(logits / case.soft_cap)
    if options.alibi_slopes is not None:
        logits = logits + float(options.alibi_slopes[head]) * (key_at - query_at)
    logits[key_at > query_at] = -np.inf
    if case.window is not None:
        logits[key_at <= query_at - case.window] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.asarray(weights @ values[:, latent_head])


def _rotary_keys(problem: Problem, latents: Array, positions: Array, head: int) -> Array:
    rebuild = problem.rebuild
    assert rebuild is not None
    keys = latents @ rebuild.key_basis[head].double().numpy()
    if rebuild.key_offset is not None:
        keys = keys + rebuild.key_offset[head].double().numpy()
    half = rebuild.rotary_dim // 2
    turned = keys.copy()
    for plane in range(half):
        x, y = (plane, plane + half) if rebuild.is_neox_style else (2 * plane, 2 * plane + 1)
        cos, sin = problem.rotary[0][positions, plane], problem.rotary[1][positions, plane]
        turned[:, x] = keys[:, x] * cos - keys[:, y] * sin
        turned[:, y] = keys[:, y] * cos + keys[:, x] * sin
    return turned


def tolerance(case: Case, *, rounds_keys: bool = False) -> float:
    """Largest error allowed, absolute, against values of size about one.

    rounds_keys: rebuilt keys are kept in bfloat16, which large scores show.
    """
    limit = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[
        case.dtype
    ]
    if rounds_keys and case.rebuild and case.dtype == torch.bfloat16:
        limit = 5e-2
    return limit * max(1.0, case.v_scale)
