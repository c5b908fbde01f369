# SPDX-License-Identifier: Apache-2.0
"""One prepared layer on a GPU: the launches of its cache write and of its attention.

Keys are reconstructed inside the attention kernel. Reconstructing them once into a workspace would
cost prefill less arithmetic, but that workspace has the size of the batch's uncompressed keys,
which the latent cache exists to avoid, and that size is known on the device only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from vllm_eigen.kernels.gpu.checks import check_attend, check_write, typed_cache
from vllm_eigen.kernels.gpu.combine import combine_splits_kernel
from vllm_eigen.kernels.gpu.padding import CompiledSizes
from vllm_eigen.kernels.gpu.plain.attention import paged_attention_kernel
from vllm_eigen.kernels.gpu.plain.reconstruct import TILE_START_STEP, PackedReconstruction
from vllm_eigen.kernels.gpu.plain.write import cache_write_kernel, down_project_and_write_kernel
from vllm_eigen.kernels.gpu.plan import GpuPlan
from vllm_eigen.kernels.gpu.tiles import (
    MIN_DOT,
    Shape,
    Tile,
    Tuning,
    chunks,
    kept_columns,
    padded,
)
from vllm_eigen.kernels.gpu.workspace import Partials, Workspace
from vllm_eigen.kernels.interface import LayerSpec, Limits, Plan

PROJECTED_TOKENS = 64
"""Tokens a program of the down-projection: the same for any batch, and so are its results."""


@dataclass(frozen=True, eq=False)
class GpuLayer:
    """See `interface.PreparedLayer`.

    sizes: what its kernels are compiled for.
    decode, prefill: the tiles of the two kernels; a decode program serves decode_heads query heads.
    packed: None where keys are not reconstructed.
    workspace: all layers' of a device, which run one after the other.
    reads_shared: whether products take operands from shared memory, as of capability 9.0.
    """

    spec: LayerSpec
    shape: Shape
    sizes: CompiledSizes
    tuning: Tuning
    decode: Tile
    decode_heads: int
    prefill: Tile
    packed: PackedReconstruction | None
    workspace: Workspace
    reads_shared: bool

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """See `interface.PreparedLayer.write_cache`."""
        spec, cache = self.spec, typed_cache(kv_cache, self.spec)
        num_tokens = slot_mapping.shape[0]
        check_write(spec, key, value, num_tokens)
        if num_tokens == 0:
            return
        block_rank = triton.next_power_of_2(self.sizes.rank)
        strides = (
            *(key.stride(0), key.stride(1)),
            *(value.stride(0), value.stride(1)),
            *(cache.stride(0), cache.stride(1)),
        )
        scales = spec.k_scale, spec.v_scale
        constants = {
            "unit": self.sizes.unit,
            "block_size": cache.shape[2],
            "fp8_limit": torch.finfo(cache.dtype).max if spec.is_fp8 else 0.0,
        }
        projection = spec.down_projection
        if projection is None:
            block_heads = min(triton.next_power_of_2(spec.num_kv_heads), max(1, 2048 // block_rank))
            cache_write_kernel[(num_tokens, triton.cdiv(spec.num_kv_heads, block_heads))](
                *(key, value, cache, slot_mapping, *strides, *scales, *self._units),
                **constants,
                num_heads=spec.num_kv_heads,
                BLOCK_HEADS=block_heads,
                BLOCK_RANK=block_rank,
            )
            return
        grid = triton.cdiv(num_tokens, PROJECTED_TOKENS), spec.num_kv_heads, 2
        down_project_and_write_kernel[grid](
            *(key, value),
            *(projection.key, projection.key if projection.value is None else projection.value),
            projection.key_bias,
            None if projection.value is None else projection.value_bias,
            *(cache, slot_mapping, num_tokens, *strides, *scales, *self._units),
            **constants,
            key_size=key.shape[2],
            value_size=value.shape[2],
            projects_values=projection.value is not None,
            BLOCK_TOKENS=PROJECTED_TOKENS,
            BLOCK_D=min(64, padded(max(key.shape[2], value.shape[2]))),
            BLOCK_RANK=max(MIN_DOT, block_rank),
            precision=precision(key.dtype),
            num_warps=4 if block_rank <= 128 else 8,
            num_stages=1,
        )

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor, plan: Plan
    ) -> None:
        """See `interface.PreparedLayer.attend`."""
        cache = typed_cache(kv_cache, self.spec)
        gpu_plan = check_attend(self.spec, query, cache, output, plan)
        num_seqs = plan.step.seq_lens.shape[0]
        if query.shape[0] == 0 or num_seqs == 0:
            return
        num_slots = gpu_plan.max_decode_query_len
        num_splits = self._num_splits(gpu_plan.max_seq_len, gpu_plan.split_size)
        width = self._partial_width
        rows = (num_slots, self.spec.num_heads, num_splits) if num_splits > 1 else (0,)
        # So many sequences at a time as the workspace has room for.
        for part, partials in self.workspace.parts(num_seqs, rows, width, query.device):
            some = gpu_plan if num_seqs <= part.stop - part.start else _part(gpu_plan, part)
            call = Call(query, cache, output, some, partials, num_slots, num_splits)
            if num_slots > 0:
                self._attend(call, self.decode, is_decode=True)
                if num_splits > 1:
                    self._combine(call)
        if gpu_plan.max_query_len > self.tuning.max_decode:
            call = replace(call, plan=gpu_plan)
            self._attend(call, self.prefill, is_decode=False)

    def reserve(self, limits: Limits, split_size: int) -> None:
        """Make room for the partial results of the largest step within `limits`."""
        num_splits = self._num_splits(limits.max_seq_len, split_size)
        heads = self.spec.num_heads
        rows = (self.tuning.max_decode, heads, num_splits) if num_splits > 1 else (0,)
        self.workspace.reserve(limits.max_num_seqs, rows, self._partial_width, limits.device)

    @property
    def _partial_width(self) -> int:
        """Numbers of a row of partial results."""
        return self.sizes.padding.value

    @property
    def _units(self) -> tuple[int, int]:
        """Both ranks, in units."""
        return self.spec.rank_k // self.sizes.unit, self.spec.rank_v // self.sizes.unit

    def _num_splits(self, max_seq_len: int, split_size: int) -> int:
        """Splits of a sequence at most."""
        if (window := self.spec.scores.sliding_window) is not None:
            # Wherever they begin, the keys of a window touch at most one split more.
            max_seq_len = min(max_seq_len, window + self.tuning.max_decode + split_size)
        return int(triton.cdiv(max_seq_len, split_size))

    def _attend(self, call: Call, tile: Tile, *, is_decode: bool) -> None:
        spec, shape = self.spec, self.shape
        heads = self._heads_per_tile(is_decode)
        planes, padding = self.sizes.planes, self.sizes.padding
        paged_attention_kernel[self._grid(call, tile, is_decode)](
            *self._operands(call),
            *self._strides(call),
            *(spec.k_scale, spec.v_scale, *self._units),
            **self._options(call, tile, is_decode),
            reconstructed_per_tile=heads // shape.heads_per_reconstructed,
            unit=self.sizes.unit,
            planes=planes,
            k_chunks=chunks(padding.key // planes),
            v_chunks=chunks(padding.value // planes),
            is_fp8=spec.is_fp8,
            # Only read with reconstructed keys: one compiled kernel serves all ranks otherwise.
            head_size=call.query.shape[2] if self.packed else 0,
        )

    def _heads_per_tile(self, is_decode: bool) -> int:
        """Query heads that a program serves."""
        return self.decode_heads if is_decode else self.shape.heads_per_reconstructed

    def _grid(self, call: Call, tile: Tile, is_decode: bool) -> tuple[int, int, int]:
        """Programs of an attention kernel."""
        heads = self._heads_per_tile(is_decode)
        num_seqs = call.plan.step.seq_lens.shape[0]
        num_tiles, block_q = self.shape.num_heads // heads, tile.block_m // heads
        if is_decode:
            return num_tiles * triton.cdiv(call.num_slots, block_q), num_seqs, call.num_splits
        return num_tiles * (call.query.shape[0] // block_q + num_seqs), 1, 1

    def _operands(self, call: Call) -> tuple[Any, ...]:
        """What both attention kernels begin with: tensors, and how the step is cut."""
        step, packed = call.plan.step, self.packed
        rotary = packed.rotary if packed else None
        return (
            *(call.query, call.cache, call.output),
            *(call.partials.acc, call.partials.row_max, call.partials.row_sum),
            *(step.query_start_loc, step.seq_lens, step.block_table),
            self.spec.scores.alibi_slopes,
            packed.basis if packed else None,
            packed.offset if packed else None,
            self._in_tile,
            rotary.tile_start if rotary else None,
            rotary.table.cos_sin if rotary else None,
            *(step.seq_lens.shape[0], call.num_slots, call.num_splits, call.plan.split_size),
        )

    @property
    def _in_tile(self) -> torch.Tensor | None:
        """Angles within a tile, as queries take them."""
        if self.packed is None:
            return None
        rotary = self.packed.rotary
        return rotary.in_tile if self.spec.dtype.itemsize == 4 else rotary.in_tile_halves

    def _strides(self, call: Call) -> tuple[Any, ...]:
        """What follows in both: strides, softmax scale and soft cap."""
        query, cache, output, scores = call.query, call.cache, call.output, self.spec.scores
        return (
            *(query.stride(0), query.stride(1)),
            *(output.stride(0), output.stride(1)),
            *(cache.stride(0), cache.stride(1)),
            call.plan.step.block_table.stride(0),
            *(scores.scale, scores.soft_cap or 1.0),
        )

    def _options(self, call: Call, tile: Tile, is_decode: bool) -> dict[str, Any]:
        """What both attention kernels are compiled for."""
        shape, packed, scores = self.shape, self.packed, self.spec.scores
        rotary = packed.rotary if packed else None
        heads = self._heads_per_tile(is_decode)
        relative = is_decode and self.tuning.relative_rotation and rotary is not None
        relative = relative and rotary is not None and rotary.in_tile is not None
        kept = kept_columns(self.reads_shared)
        return {
            "num_heads": shape.num_heads,
            "heads_per_tile": heads,
            "tiles_per_latent": shape.heads_per_latent // heads,
            "block_size": call.cache.shape[2],
            "window": scores.sliding_window or 0,
            "has_cap": scores.soft_cap is not None,
            "reconstruct": packed is not None,
            "relative": relative,
            # Those of wide keys would not fit the registers.
            "keeps_angles": relative and not tile.streams and shape.columns <= kept,
            "tile_start_step": TILE_START_STEP,
            "is_neox": rotary is not None and rotary.table.is_neox_style,
            "rotary_dim": rotary.table.rotary_dim if rotary else 0,
            "half": packed.half if packed else 0,
            "rest": packed.rest if packed else 0,
            "is_decode": is_decode,
            "max_decode": self.tuning.max_decode,
            "swap_ab": tile.swap_ab,
            # Addresses of many operands in shared memory, and angles, would not fit the registers;
            # a basis that is read for each tile would move out of the loop.
            "hoists": not (
                tile.streams or (self.reads_shared and is_decode and packed is not None)
            ),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "precision": precision(call.query.dtype),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def _combine(self, call: Call) -> None:
        step, output = call.plan.step, call.output
        width = self._partial_width
        combine_splits_kernel[(self.spec.num_heads, step.seq_lens.shape[0], call.num_slots)](
            *(output, call.partials.acc, call.partials.row_max, call.partials.row_sum),
            *(step.query_start_loc, step.seq_lens),
            *(call.num_slots, call.num_splits, call.plan.split_size),
            *(output.stride(0), output.stride(1)),
            self.spec.v_scale if self.spec.is_fp8 else 1.0,
            *(self.spec.rank_v, width),
            num_heads=self.spec.num_heads,
            BLOCK_V=triton.next_power_of_2(self.sizes.rank),
            window=self.spec.scores.sliding_window or 0,
            max_decode=self.tuning.max_decode,
            BLOCK_SPLITS=16,
        )


@dataclass(frozen=True, eq=False)
class Call:
    """The tensors of one `attend`.

    num_slots: queries of a decoded sequence at most.
    """

    query: torch.Tensor
    cache: torch.Tensor
    output: torch.Tensor
    plan: GpuPlan
    partials: Partials
    num_slots: int
    num_splits: int


def _part(plan: GpuPlan, part: slice) -> GpuPlan:
    """The plan of some of the step's sequences; their queries stay where they are."""
    step = plan.step
    some = replace(
        step,
        query_start_loc=step.query_start_loc[part.start : part.stop + 1],
        seq_lens=step.seq_lens[part],
        block_table=step.block_table[part],
        query_start_loc_cpu=None,  # The plan has what it was read for.
    )
    return replace(plan, step=some)


def precision(dtype: torch.dtype) -> str:
    """How Triton multiplies float32: in three parts, since one TF32 product is too coarse."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
