# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,assignment,var-annotated"
"""Cached numbers on a GPU: chunks of a rank, and the planes of numbers of one byte.

A word is what is loaded as one: a number, or two of one byte where every row begins on two. Numbers
of one byte alone would reach the operands of a product 8 bytes a load, and not transposed; words
of 16 bits do as bfloat16 does. Plane p of a chunk is number p of each of its words, so it has
every second dimension, and what meets it is loaded in that order. `chunks` are (first word, words)
throughout, powers of two; `planes` are the numbers of a word.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_latents(latents, valid, rank_words, chunks: tl.constexpr):
    """Words `[BLOCK_N, words]` of each chunk, 0 where not valid or past the rank.

    latents, valid `[BLOCK_N, 1]`: pointers to the first word of each token.
    """
    loaded = ()
    for c in tl.static_range(len(chunks)):
        word = _words(tl.constexpr(chunks[c]))
        loaded = loaded + (tl.load(latents + word, mask=valid & (word < rank_words), other=0.0),)
    return loaded


@triton.constexpr_function
def unpacking(plane, is_e5m2):
    """PTX for one plane of two words of two numbers: two numbers of float16.

    Exact, and a NaN stays one. Two instructions make two numbers.
    """
    element = "e5m2" if is_e5m2 else "e4m3"
    return (
        "{ .reg .b32 x; .reg .b16 two; "
        f"prmt.b32 x, $1, 0, {0x31 if plane else 0x20:#x}; "
        f"cvt.u16.u32 two, x; cvt.rn.f16x2.{element}x2 $0, two; }}"
    )


@triton.jit
def numbers_of(
    words, plane: tl.constexpr, planes: tl.constexpr, is_e5m2: tl.constexpr, dtype: tl.constexpr
):
    """A plane of words."""
    if planes == 1:
        numbers = words
    else:
        numbers = tl.inline_asm_elementwise(
            unpacking(plane, is_e5m2), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    return numbers.to(dtype)


@triton.jit
def load_query_chunks(query_row, valid, rank_words, chunks: tl.constexpr, planes: tl.constexpr):
    """What planes of keys are multiplied by: `[BLOCK_M, words]` of each plane of each chunk.

    query_row, valid `[BLOCK_M, 1]`: pointers to queries `[rank_k]`.
    """
    loaded = ()
    for c in tl.static_range(len(chunks)):
        word = _words(tl.constexpr(chunks[c]))
        for plane in tl.static_range(planes):
            at = query_row + (word * planes + plane)
            loaded = loaded + (tl.load(at, mask=valid & (word < rank_words), other=0.0),)
    return loaded


@triton.jit
def load_basis_rows(
    basis,
    first: tl.constexpr,
    columns: tl.constexpr,
    width: tl.constexpr,
    chunks: tl.constexpr,
    planes: tl.constexpr,
):
    """Columns from `first` on of a basis `[padded rank, width]`.

    Returns `[words, columns]` of each plane of each chunk.
    """
    column = first + tl.arange(0, columns)[None, :]
    loaded = ()
    for c in tl.static_range(len(chunks)):
        word = chunks[c][0] + tl.arange(0, tl.constexpr(chunks[c][1]))[:, None]
        for plane in tl.static_range(planes):
            loaded = loaded + (tl.load(basis + (word * planes + plane) * width + column),)
    return loaded


@triton.jit
def zero_sums(
    chunks: tl.constexpr, planes: tl.constexpr, BLOCK_M: tl.constexpr, swap_ab: tl.constexpr
):
    """Sums over each plane of each chunk, `[BLOCK_M, words]`, or transposed."""
    sums = ()
    for c in tl.static_range(len(chunks)):
        for _ in tl.static_range(planes):
            if swap_ab:
                sums = sums + (tl.zeros([tl.constexpr(chunks[c][1]), BLOCK_M], tl.float32),)
            else:
                sums = sums + (tl.zeros([BLOCK_M, tl.constexpr(chunks[c][1])], tl.float32),)
    return sums


@triton.jit
def store_sums(
    target,
    sums,
    factor,
    valid,
    rank_words,
    chunks: tl.constexpr,
    planes: tl.constexpr,
    swap_ab: tl.constexpr,
):
    """Latents from `zero_sums`, times a factor of each row.

    target, factor, valid `[BLOCK_M, 1]`: pointers to rows `[rank_v]`.
    """
    element: tl.constexpr = target.dtype.element_ty
    for c in tl.static_range(len(chunks)):
        word = _words(tl.constexpr(chunks[c]))
        for plane in tl.static_range(planes):
            some = sums[c * planes + plane]
            if swap_ab:
                some = tl.trans(some)
            tl.store(
                target + (word * planes + plane),
                (some * factor).to(element),
                mask=valid & (word < rank_words),
            )


@triton.jit
def _words(chunk: tl.constexpr):
    """The words `[1, words]` of a chunk."""
    return chunk[0] + tl.arange(0, chunk[1])[None, :]
