# SPDX-License-Identifier: Apache-2.0
"""Shapes of GPU programs: what runs fastest, as far as it fits the device's shared memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton

from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.interface import KeyReconstruction

MIN_DOT = 16
"""The smallest side of a matrix-unit operand."""

MAX_BLOCK_N = 128
"""The most keys a step, so the most positions a tile's rotary table must hold."""

CHUNK_COLUMNS = 64
"""Columns of a key that are reconstructed at once."""

HOPPER_SHARED_BYTES = 232_448
"""What one program may use on compute capability 9.0."""


@dataclass(frozen=True)
class Tile:
    """Shape of one program: queries times heads, keys a step, and what Triton may spend on it.

    Triton keeps (num_stages - 1) / 2 steps of latents in flight, since a block number is loaded
    before the block. swap_ab: multiply keys by queries, so that keys fill the matrix unit's rows.
    streams: the basis that codes of keys are reconstructed with is read for each tile of keys, a
    plane of codes at a time, rather than stay in shared memory.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    swap_ab: bool
    streams: bool = False


@dataclass(frozen=True)
class Tuning:
    """What to measure on a new GPU; a tile grows where one token has more heads than block_m.

    max_decode: the most queries a sequence may have to be decoded rather than prefilled. Those that
        do not fit one tile are in several, which read the same keys.
    decode_split: the fewest keys a split holds. Long contexts take larger splits, by the width of
        the block table, which an engine never changes.
    relative_rotation: in decode, split positions into tile start and offset where the rotary table
        allows.
    share_latents: one decode program serves all reconstructed heads of a latent head, so that a
        latent is read once; otherwise neighbouring programs find it in the L2 cache.
    """

    decode: Tile = Tile(16, 64, 4, 3, swap_ab=True)
    decode_reconstruct: Tile = Tile(16, 64, 4, 5, swap_ab=True)
    decode_coded: Tile = Tile(16, 64, 4, 5, swap_ab=True)
    decode_coded_reconstruct: Tile = Tile(16, 64, 4, 3, swap_ab=True)
    prefill: Tile = Tile(128, 64, 8, 3, swap_ab=False)
    max_decode: int = 16
    decode_split: int = 512
    relative_rotation: bool = True
    share_latents: bool = True


@dataclass(frozen=True)
class Shape:
    """One call's head counts, ranks and element sizes.

    numbers_k, numbers_v: latents of a token as operands of a product, padded.
    cached_bytes: bytes of a token's tile.
    operands: numbers made of a token's tile that are in shared memory at once.
    unswapped: of codes, those that are there with swap_ab too.
    columns: padded width of a reconstructed key, 0 where keys are cached as they are used.
    widest: the most numbers of a token that a program holds at once.
    element_size: bytes of a query element.
    """

    num_heads: int
    heads_per_latent: int
    heads_per_reconstructed: int
    rank_k: int
    rank_v: int
    numbers_k: int
    numbers_v: int
    cached_bytes: int
    operands: int
    unswapped: int
    is_coded: bool
    columns: int
    widest: int
    element_size: int


def reads_shared(shared_bytes: int) -> bool:
    """Whether products take operands from shared memory: on devices with so much of it."""
    return shared_bytes >= HOPPER_SHARED_BYTES


def kept_columns(reads_shared: bool) -> int:
    """Columns of a key at most whose angles stay in registers; others are read for each tile."""
    return 128 if reads_shared else 64


def rank_chunks(rank: int) -> tuple[int, int]:
    """Split a rank into two powers of two (the second may be 0): 77 is 64 + 16, not 128."""
    whole = max(MIN_DOT, triton.next_power_of_2(rank))
    head = whole // 2
    tail = max(MIN_DOT, triton.next_power_of_2(rank - head))
    return (head, tail) if head >= MIN_DOT and tail < head else (whole, 0)


def chunks(rank: int) -> tuple[tuple[int, int], ...]:
    """Where the parts of `rank_chunks` begin, and their sizes."""
    head, tail = rank_chunks(rank)
    return ((0, head), (head, tail)) if tail else ((0, head),)


def padded(size: int) -> int:
    """A dimension as the matrix unit takes it; 0 stays 0."""
    return max(MIN_DOT, int(triton.next_power_of_2(size))) if size else 0


def padded_pairs(reconstruction: KeyReconstruction) -> tuple[int, int]:
    """The numbers of RoPE pairs and of unrotated dimensions of a key, as the kernel pads them."""
    rotary_dim = reconstruction.rotary.rotary_dim
    pairs = max(MIN_DOT, padded(rotary_dim // 2))
    return pairs, padded(reconstruction.key_basis.shape[2] - rotary_dim)


def fit(tile: Tile, heads: int, shape: Shape, shared_bytes: int) -> Tile:
    """`tile` for `heads` query heads a token, or the largest smaller one that fits.

    Raises KernelError where even the smallest does not.
    """
    least_m = padded(heads)
    block_m = max(tile.block_m, least_m)
    is_large = block_m > 64 or heads > shape.heads_per_reconstructed
    # Transposed, four warps multiply 64 keys; more would hold them twice.
    is_large |= shape.widest > 128 and not tile.swap_ab
    # More in flight would take them from wide keys, and from numbers that are converted.
    takes_registers = shape.columns > 128 or (shape.columns > 0 and shape.operands > 0)
    tile = replace(
        tile,
        block_m=block_m,
        num_warps=max(tile.num_warps, 8 if is_large else 1),
        num_stages=min(tile.num_stages, 3) if takes_registers else tile.num_stages,
        swap_ab=tile.swap_ab and block_m < 64,
    )
    kept = kept_columns(reads_shared(shared_bytes))
    while _shared_bytes(tile, heads, shape, kept) > shared_bytes:
        if tile.num_stages > 1:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif shape.is_coded and shape.columns > CHUNK_COLUMNS and not tile.streams:
            tile = replace(tile, streams=True)
            if least_m < 64:
                # What is read from the L2 cache should serve many keys, as far as registers allow.
                block_m = max(least_m, min(tile.block_m, 32))
                tile = replace(
                    tile, block_m=block_m, block_n=MAX_BLOCK_N, num_warps=8, swap_ab=True
                )
        elif tile.block_m > max(least_m, 32):
            tile = replace(tile, block_m=tile.block_m // 2)
        elif tile.block_n > MIN_DOT:
            num_warps = 4 if tile.streams and tile.swap_ab else tile.num_warps
            tile = replace(tile, block_n=tile.block_n // 2, num_warps=num_warps)
        else:
            raise KernelError(
                f"gpu kernels: ranks {shape.rank_k} and {shape.rank_v} with {heads} heads and"
                f" {shape.element_size}-byte elements need more than this device's {shared_bytes}"
                " bytes of shared memory; use bfloat16, fewer bits, or keys cached after RoPE"
                " (calibrate --prefer speed), or EIGEN_KERNELS=reference"
            )
    return tile


def fit_decode(tuning: Tuning, shape: Shape, shared_bytes: int) -> tuple[Tile, int]:
    """The decode tile, and how many heads it serves: a latent head's, or a reconstructed head's.

    Raises KernelError as `fit` does.
    """
    tile = tuning.decode_reconstruct if shape.columns else tuning.decode
    if shape.is_coded:
        tile = tuning.decode_coded_reconstruct if shape.columns else tuning.decode_coded
    if tuning.share_latents and not shape.is_coded:
        try:
            return fit(tile, shape.heads_per_latent, shape, shared_bytes), shape.heads_per_latent
        except KernelError:
            # The bases of the whole group do not fit at once.
            pass
    return fit(
        tile, shape.heads_per_reconstructed, shape, shared_bytes
    ), shape.heads_per_reconstructed


def _shared_bytes(tile: Tile, heads: int, shape: Shape, kept: int) -> int:
    """Roughly what Triton 3.6 to 3.9 takes for a program on Hopper, from above."""
    in_flight = 1 + max(min(tile.num_stages - 1, 1), (tile.num_stages - 1) // 2)
    operands = shape.operands
    if shape.is_coded and tile.swap_ab:
        # Planes of codes are operands where they lie, in registers, and few are not.
        in_flight = 1 if tile.num_stages <= 3 else in_flight
        operands = shape.unswapped
    latents = in_flight * tile.block_n * shape.cached_bytes
    # Once more as the operand of a product: dequantised, or float32 in three tf32 parts.
    latents += tile.block_n * operands * shape.element_size
    reconstructed = 0
    if shape.columns:
        bases = heads // shape.heads_per_reconstructed
        columns = CHUNK_COLUMNS if tile.streams else shape.columns
        # Of codes a plane is read at a time.
        rows = shape.operands // 2 if tile.streams else shape.numbers_k
        basis = rows * columns * shape.element_size
        reconstructed = bases * basis
        if tile.swap_ab and bases > 1:
            # Bases in the layout of the other operand too, and keys of all heads but the last.
            keys = tile.block_n * shape.columns * shape.element_size
            reconstructed += bases * basis + (bases - 1) * keys
        if tile.swap_ab and shape.columns > kept and tile.num_stages > 1:
            # Cosines and sines of decode, as two halves.
            reconstructed += tile.block_n * columns * 2
        if not tile.swap_ab:
            # Keys on their way from one product to the next, and cosines and sines in float32.
            reconstructed += tile.block_n * columns * (shape.element_size + 4 * in_flight)
    queries = tile.block_m * (shape.columns or shape.numbers_k) * shape.element_size
    scores = tile.block_m * tile.block_n * 4
    return latents + reconstructed + queries + scores
