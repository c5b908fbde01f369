# SPDX-License-Identifier: Apache-2.0
"""What is checked and timed on a GPU: points, their layers, and random inputs on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.kernels import KeyReconstruction, LayerSpec, RotaryTable, ScoreOptions, Step

BLOCK_SIZE = 64
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class GpuPoint:
    """One row of the table. Lengths in tokens.

    bits: of a cached number: 16, 8 (fp8), or with codes about 4 or 2.
    kv_ratio: ranks over head size; codes keep nearly all directions.
    """

    heads: int
    kv_heads: int
    head_size: int
    key_mode: KeyMode
    phase: str
    context: int
    batch: int
    bits: int = 16
    kv_ratio: float = 1.0

    @property
    def codes(self) -> tuple[Code, Code] | None:
        """Of keys and values; None where numbers are cached."""
        size = self.head_size
        if self.bits == 4:
            two = -(-size // 128) * 16
            key = Code(eight=size // 16, four=size - two - size // 8, two=two)
            return key, Code(four=size, token_scale=True)
        if self.bits == 2:
            key = Code(eight=size // 16, four=size // 4, two=size // 2)
            return key, Code(four=size // 4, two=3 * size // 4, token_scale=True)
        return None

    @property
    def ranks(self) -> tuple[int, int]:
        """rank_k, rank_v whose rows start on 16 bytes; keys give way to values, as they can."""
        if self.codes is not None:
            return self.codes[0].rank, self.codes[1].rank
        if self.kv_ratio == 1.0:
            return self.head_size, self.head_size
        rank_k = int(self.kv_ratio * self.head_size) // 16 * 16
        return rank_k, int(2 * self.kv_ratio * self.head_size - rank_k) // 16 * 16

    @property
    def queries(self) -> int:
        """Of a sequence."""
        return 1 if self.phase == "decode" else self.context


@dataclass(frozen=True, eq=False)
class Inputs:
    """One point's layer, step and tensors, on the device. The cache is not written yet.

    key, value: latents of all tokens, sequence after sequence; slots: where they belong.
    """

    layer: LayerSpec
    step: Step
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    cache: torch.Tensor
    output: torch.Tensor


def layer_of(point: GpuPoint, device: str) -> LayerSpec:
    """The layer, with a random basis where keys are reconstructed."""
    rank_k, rank_v = point.ranks
    reconstruction = None
    if point.key_mode.reconstructs_keys:
        size = point.head_size
        frequencies = 10000.0 ** -torch.linspace(0, 1, size // 2 + 1)[:-1]
        rotary = RotaryTable.from_frequencies(frequencies, max(256, point.context))
        rotary = replace(rotary, cos_sin=rotary.cos_sin.to(device))
        basis = torch.randn(point.kv_heads, rank_k, size, dtype=DTYPE, device=device)
        reconstruction = KeyReconstruction(basis / rank_k**0.5, rotary)
    key_code, value_code = point.codes or (None, None)
    return LayerSpec(
        num_heads=point.heads,
        num_kv_heads=point.kv_heads,
        rank_k=rank_k,
        rank_v=rank_v,
        dtype=DTYPE,
        cache_dtype={16: DTYPE, 8: torch.float8_e4m3fn}.get(point.bits, torch.uint8),
        # Coded latents come in steps: they are larger than others.
        scores=ScoreOptions(point.head_size**-0.5 / (_CODE_SIZE if point.codes else 1.0)),
        reconstruction=reconstruction,
        key_code=key_code,
        value_code=value_code,
    )


def make(point: GpuPoint, device: str) -> Inputs:
    """Random latents, whose slots are in shuffled blocks."""
    layer = layer_of(point, device)
    blocks = -(-point.context // BLOCK_SIZE)
    options: dict[str, Any] = {"dtype": DTYPE, "device": device}
    tokens, cached = point.batch * point.queries, point.batch * point.context
    table = torch.randperm(point.batch * blocks, device=device).int().view(point.batch, -1)
    position = torch.arange(point.context, device=device)
    slots = table[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
    width = layer.key_width + layer.value_width
    size = _CODE_SIZE if point.codes else 1.0
    return Inputs(
        layer=layer,
        step=Step(
            torch.arange(point.batch + 1, dtype=torch.int32, device=device) * point.queries,
            torch.full((point.batch,), point.context, dtype=torch.int32, device=device),
            table,
            num_actual_tokens=tokens,
            max_query_len=point.queries,
            max_seq_len=point.context,
        ),
        query=torch.randn(tokens, point.heads, layer.query_size, **options),
        key=torch.randn(cached, point.kv_heads, layer.rank_k, **options) * size,
        value=torch.randn(cached, point.kv_heads, layer.rank_v, **options) * size,
        slots=slots.flatten(),
        cache=torch.zeros(
            *(point.batch * blocks, point.kv_heads, BLOCK_SIZE, width),
            dtype=layer.cache_dtype,
            device=device,
        ),
        output=torch.full((tokens, point.heads, layer.rank_v), float("nan"), **options),
    )


_CODE_SIZE = 3.0
"""Standard deviation of latents in steps: 4-bit codes use their range, and clip some."""


def cached_bytes(point: GpuPoint) -> int:
    """Bytes of the cache that one attention reads."""
    rank_k, rank_v = point.ranks
    codes = point.codes
    one = sum(c.num_bytes for c in codes) if codes else (rank_k + rank_v) * point.bits // 8
    return point.batch * point.context * point.kv_heads * one
