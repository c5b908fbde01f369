# SPDX-License-Identifier: Apache-2.0
"""Random attention problems, their answer in float64 written out directly, and a way to run them.

The answer shares no code with `vllm_eigen.kernels`: one query token and head at a time, dense
softmax, latents as the cache stores them (rounded to its dtype).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from tests.kernels.decoded import decoded
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels import (
    DownProjection,
    Kernels,
    KeyReconstruction,
    LayerSpec,
    RotaryTable,
    ScoreOptions,
    Step,
)
from vllm_eigen.kernels.rope import pair_order

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One batch. `sequences` holds (tokens already cached, new tokens) of each."""

    num_kv_heads: int = 2
    group: int = 1  # reconstructed heads a latent head serves (1 without reconstruct)
    queries_per_head: int = 1
    rank_k: int = 8
    rank_v: int = 8
    block_size: int = 16
    sequences: tuple[tuple[int, int], ...] = ((0, 5),)
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    head_size: int = 16
    reconstruct: bool = False
    rotary_dim: int = 8
    rope_base: float | None = None  # None: random frequencies, a table of the case's dtype
    is_neox_style: bool = True
    triangular: bool = False  # the j-th dimension, pairs in their order, reads j + 1 latents
    offset: bool = False
    alibi: bool = False
    window: int | None = None
    soft_cap: float | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    encoded_size: int = 0  # width of what is encoded when written; 0 writes latents
    projects_values: bool = True  # or keys alone
    codes: tuple[Code, Code] | None = None  # of keys and values, in steps of 1
    seed: int = 0

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group * self.queries_per_head

    @property
    def query_size(self) -> int:
        return self.head_size if self.reconstruct else self.rank_k

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.uint8 if self.codes else self.cache_dtype or self.dtype

    @property
    def widths(self) -> tuple[int, int]:
        """Elements of the cache that a key and a value take."""
        if self.codes is None:
            return self.rank_k, self.rank_v
        return self.codes[0].num_bytes, self.codes[1].num_bytes


@dataclass
class Problem:
    """A case with its tensors. Latents are per sequence `[seq_len, num_kv_heads, rank]`.

    With `down_projection`, `written` holds the keys and values of each sequence before it.
    """

    case: Case
    query: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    options: ScoreOptions
    reconstruct: KeyReconstruction | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_blocks: int
    rotary: tuple[Array, Array] = field(default=(np.zeros(0), np.zeros(0)))
    written: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    down_projection: DownProjection | None = None


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
    reconstruct, rotary = None, (np.zeros(0), np.zeros(0))
    if case.reconstruct:
        heads = case.num_kv_heads * case.group
        positions = max(lengths) + 3
        pairs, digits = case.rotary_dim // 2, case.dtype
        speeds = torch.rand(pairs, generator=rng).double()
        if case.rope_base is not None:
            # As models have it, in float32 whatever their dtype: kernels may absorb slow pairs.
            speeds, digits = case.rope_base ** -(torch.arange(pairs) / pairs), torch.float32
        angles = torch.arange(positions)[:, None] * speeds.double()
        cos, sin = angles.cos().to(digits), angles.sin().to(digits)
        # Cosines rounded to 16 bits are no even rotation.
        is_even = digits.itemsize > 2
        rotary = (cos.double().numpy(), sin.double().numpy())
        basis = normal(heads, case.rank_k, case.head_size) / math.sqrt(case.rank_k)
        if case.triangular:
            order = pair_order(case.head_size, case.rotary_dim, case.is_neox_style)
            for read, dimension in enumerate(order[: case.head_size], start=1):
                basis[:, read:, dimension] = 0.0
        reconstruct = KeyReconstruction(
            key_basis=basis.to(case.dtype),
            rotary=RotaryTable(
                torch.cat([cos, sin], dim=-1),
                tuple(speeds.tolist()) if is_even else None,
                case.is_neox_style,
            ),
            key_offset=normal(heads, case.head_size) * 0.3 if case.offset else None,
        )
    sizes = [_code_sizes(code) for code in case.codes or (None, None)]
    keys, values = (
        [(normal(n, case.num_kv_heads, rank) * size).to(case.dtype) for n in lengths]
        for rank, size in zip((case.rank_k, case.rank_v), sizes, strict=True)
    )
    written, down_projection = [], None
    if size := case.encoded_size:
        bases = [
            (normal(case.num_kv_heads, size, rank) / math.sqrt(size)).to(case.dtype)
            for rank in (case.rank_k, case.rank_v)
        ]
        wholes = [normal(n, case.num_kv_heads, size).to(case.dtype) for n in 2 * lengths]
        count = len(lengths)
        keys = [_through(rows, bases[0]).to(case.dtype) for rows in wholes[:count]]
        if case.projects_values:
            values = [_through(rows, bases[1]).to(case.dtype) for rows in wholes[count:]]
        down_projection = DownProjection(bases[0], bases[1] if case.projects_values else None)
        of_values = wholes[count:] if case.projects_values else values
        written = list(zip(wholes[:count], of_values, strict=True))
    return Problem(
        case=case,
        query=normal(int(starts[-1]) + 1, case.num_heads, case.query_size).to(case.dtype),
        keys=keys,
        values=values,
        options=ScoreOptions(
            # Coded keys are larger than others: logits of the same size.
            scale=1.5 * spread / float(sizes[0].max()),
            alibi_slopes=torch.rand(case.num_heads, generator=rng) if case.alibi else None,
            sliding_window=case.window,
            soft_cap=case.soft_cap,
        ),
        reconstruct=reconstruct,
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        num_blocks=num_blocks,
        rotary=rotary,
        written=written,
        down_projection=down_projection,
    )


def _code_sizes(code: Code | None) -> torch.Tensor:
    """Standard deviations of latents that use their codes well, and clip some."""
    if code is None:
        return torch.ones(())
    return torch.tensor([2.0 ** (width - 1) / 3 for width in code.widths])


def _through(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Rows `[n, heads, size]` times `[heads, size, rank]`, in float64."""
    return torch.from_numpy(np.einsum("nhs,hsr->nhr", rows.double(), basis.double()))


def layer_of(problem: Problem) -> LayerSpec:
    """What the kernels prepare."""
    case = problem.case
    return LayerSpec(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        rank_k=case.rank_k,
        rank_v=case.rank_v,
        dtype=case.dtype,
        cache_dtype=case.stored_dtype,
        scores=problem.options,
        k_scale=case.k_scale,
        v_scale=case.v_scale,
        reconstruction=problem.reconstruct,
        down_projection=problem.down_projection,
        key_code=None if case.codes is None else case.codes[0],
        value_code=None if case.codes is None else case.codes[1],
    )


def step_of(problem: Problem) -> Step:
    """What the kernels plan."""
    return Step(
        problem.query_start_loc,
        problem.seq_lens,
        problem.block_table,
        num_actual_tokens=problem.query.shape[0] - 1,
    )


def attending(problem: Problem, sequence: int, head: int, token: int) -> torch.Tensor:
    """`[num_tokens, num_heads]`, which rows attend to a token of a head of the cache."""
    case = problem.case
    old, new = case.sequences[sequence]
    position = old + torch.arange(new)
    seen = position >= token
    if case.window is not None:
        seen &= token > position - case.window
    rows = torch.zeros(problem.query.shape[0] - 1, case.num_heads, dtype=torch.bool)
    heads = case.num_heads // case.num_kv_heads
    start = int(problem.query_start_loc[sequence])
    rows[start : start + new, head * heads : (head + 1) * heads] = seen[:, None]
    return rows


def run(kernels: Kernels, problem: Problem, *, free_outside_window: bool = False) -> torch.Tensor:
    """Write every sequence into a cache full of NaN, then attend; `[num_tokens, heads, rank_v]`.

    Blocks stand apart in memory, as when layers share a block. With `free_outside_window` blocks
    that no query can see hold NaN again, as after vLLM frees them.
    """
    case = problem.case
    layer = kernels.prepare(layer_of(problem))
    shape = (problem.num_blocks, case.num_kv_heads + 1, case.block_size, sum(case.widths))
    cache = _never_written(case, shape)[:, 1:]
    written = problem.written or list(zip(problem.keys, problem.values, strict=True))
    for row, (keys, values) in zip(problem.block_table, written, strict=True):
        positions = torch.arange(keys.shape[0])
        slots = row[positions // case.block_size].long() * case.block_size
        slots = slots + positions % case.block_size
        # Padding between real tokens, and more rows than slots.
        slots = torch.stack([slots, torch.full_like(slots, -1)], dim=1).flatten()
        keys, values = (rows.repeat_interleave(2, 0) for rows in (keys, values))
        keys, values = (torch.cat([rows, rows[:1]]) for rows in (keys, values))
        layer.write_cache(keys, values, cache, slots)
    if free_outside_window and case.window is not None:
        nan = _never_written(case, shape)[:, 1:]
        for row, (old, _) in zip(problem.block_table, case.sequences, strict=True):
            freed = max(0, old - case.window + 1) // case.block_size
            cache.view(torch.uint8)[row[:freed].long()] = nan.view(torch.uint8)[0]
    output = torch.full((problem.query.shape[0], case.num_heads, case.rank_v), 7.0)
    output = output.to(case.dtype)
    plan = kernels.plan(step_of(problem), layer.spec.plan_geometry(case.block_size))
    layer.attend(problem.query, cache, output, plan)
    assert bool((output[-1] == 7.0).all()), "the padding row was written"
    return output[:-1]


def _never_written(case: Case, shape: tuple[int, ...]) -> torch.Tensor:
    # In a coded cache token scales alone can be NaN.
    return (
        torch.full(shape, 0xFF, dtype=torch.uint8)
        if case.codes
        else poisoned(shape, case.stored_dtype)
    )


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
        codes = case.codes or (None, None)
        keys = stored(problem.keys[i], case, case.k_scale, codes[0])
        values = stored(problem.values[i], case, case.v_scale, codes[1])
        start = int(problem.query_start_loc[i])
        query = problem.query[start : start + new].double().numpy()
        heads = [
            _attend_one_head(problem, h, query[:, h], old, keys, values)
            for h in range(case.num_heads)
        ]
        outputs.append(np.stack(heads, axis=1))
    return np.concatenate(outputs)


def stored(latents: torch.Tensor, case: Case, scale: float, code: Code | None = None) -> Array:
    """What the cache returns for latents written to it."""
    if code is not None:
        return decoded(latents.double().numpy(), code)
    dtype = case.stored_dtype
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
    reconstructed_head = head // case.queries_per_head
    latent_head = reconstructed_head // case.group
    key_at = np.arange(keys.shape[0])
    query_at = old + np.arange(query.shape[0])[:, None]
    seen_keys = keys[:, latent_head]
    if problem.reconstruct is not None:
        seen_keys = _rotary_keys(problem, seen_keys, key_at, reconstructed_head)
    logits = query @ seen_keys.T * options.scale
    if case.soft_cap is not None:
        logits = case.soft_cap * np.tanh(logits / case.soft_cap)
    if options.alibi_slopes is not None:
        logits = logits + float(options.alibi_slopes[head]) * (key_at - query_at)
    logits[key_at > query_at] = -np.inf
    if case.window is not None:
        logits[key_at <= query_at - case.window] = -np.inf
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    return np.asarray(probs @ values[:, latent_head])


def _rotary_keys(problem: Problem, latents: Array, positions: Array, head: int) -> Array:
    reconstruct = problem.reconstruct
    assert reconstruct is not None
    keys = latents @ reconstruct.key_basis[head].double().numpy()
    if reconstruct.key_offset is not None:
        keys = keys + reconstruct.key_offset[head].double().numpy()
    rotary = reconstruct.rotary
    half = rotary.rotary_dim // 2
    rotated = keys.copy()
    for pair in range(half):
        x, y = (pair, pair + half) if rotary.is_neox_style else (2 * pair, 2 * pair + 1)
        cos, sin = problem.rotary[0][positions, pair], problem.rotary[1][positions, pair]
        rotated[:, x] = keys[:, x] * cos - keys[:, y] * sin
        rotated[:, y] = keys[:, y] * cos + keys[:, x] * sin
    return rotated


def tolerance(case: Case, *, rounds_keys: bool = False, in_integers: bool = False) -> float:
    """Largest error allowed, absolute, against values of size about one.

    rounds_keys: reconstructed keys are kept in bfloat16, which large scores show.
    in_integers: queries and weights of a coded cache are rounded to 15 bits.
    """
    if case.codes:
        size = max(3 * float(_code_sizes(case.codes[1]).max()), 1.0)
        limit = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-3}.get(
            case.dtype, 8e-3
        )
        if in_integers:
            limit = max(limit, 2e-4)
        if rounds_keys and case.reconstruct and case.dtype == torch.bfloat16:
            limit = 2e-2
        return limit * size
    limit = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[
        case.dtype
    ]
    if rounds_keys and case.reconstruct and case.dtype == torch.bfloat16:
        limit = 5e-2
    return limit * max(1.0, case.v_scale)
