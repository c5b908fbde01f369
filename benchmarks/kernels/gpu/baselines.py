# SPDX-License-Identifier: Apache-2.0
"""What the kernels are compared with: attention over full heads in 16 bits, as others have it.

Each baseline returns a call that attends once, or raises what its package raises where it is not
installed or does not cover the point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_eigen.benchmarks.kernels.gpu.points import BLOCK_SIZE, DTYPE, GpuPoint

SEGMENTS = 16
"""Splits of a sequence in vLLM's Triton kernels."""


@dataclass(frozen=True, eq=False)
class FullInputs:
    """A batch of full heads on the device; keys and values `[blocks, block_size, kv_heads, size]`,
    sequence after sequence, so that they can be read without blocks too."""

    point: GpuPoint
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor

    @classmethod
    def of(cls, point: GpuPoint, device: str) -> FullInputs:
        """Random inputs; contexts are filled up to whole blocks."""
        blocks = -(-point.context // BLOCK_SIZE)
        tokens, size = point.batch * point.queries, point.head_size
        options: dict[str, Any] = {"dtype": DTYPE, "device": device}
        indices: dict[str, Any] = {"dtype": torch.int32, "device": device}
        shape = point.batch * blocks, BLOCK_SIZE, point.kv_heads, size
        return cls(
            point=point,
            query=torch.randn(tokens, point.heads, size, **options),
            keys=torch.randn(shape, **options),
            values=torch.randn(shape, **options),
            output=torch.zeros(tokens, point.heads, size, **options),
            query_start_loc=torch.arange(point.batch + 1, **indices) * point.queries,
            seq_lens=torch.full((point.batch,), point.context, **indices),
            block_table=torch.arange(point.batch * blocks, **indices).view(point.batch, -1),
        )

    def segments(self) -> tuple[int, dict[str, Any]]:
        """Threshold and buffers of vLLM's split decode, as its backend allocates them."""
        point = self.point
        threshold = max(1, 128 // point.kv_heads)
        rows = (threshold, point.heads, SEGMENTS)
        size = 1 << (point.head_size - 1).bit_length()
        made = [
            torch.empty(shape, dtype=torch.float32, device=self.query.device)
            for shape in ((*rows, size), rows, rows)
        ]
        return threshold, {
            "num_par_softmax_segments": SEGMENTS,
            "softmax_segm_output": made[0],
            "softmax_segm_max": made[1],
            "softmax_segm_expsum": made[2],
        }


def torch_sdpa(full: FullInputs) -> Callable[[], object]:
    """PyTorch's own choice, without blocks."""
    point = full.point
    query = full.query.view(point.batch, point.queries, point.heads, -1).transpose(1, 2)
    keys, values = (
        rows.view(point.batch, -1, *rows.shape[2:])[:, : point.context].transpose(1, 2)
        for rows in (full.keys, full.values)
    )
    return partial(
        torch.nn.functional.scaled_dot_product_attention,
        *(query, keys, values),
        # A decoded token sees everything; the mask of one query would be aligned to the first key.
        is_causal=point.queries > 1,
        enable_gqa=True,
    )


def flash_attn(full: FullInputs) -> Callable[[], object]:
    """The package of that name, without blocks."""
    from flash_attn import flash_attn_with_kvcache

    point = full.point
    keys, values = (
        rows.view(point.batch, -1, *rows.shape[2:]) for rows in (full.keys, full.values)
    )
    query = full.query.view(point.batch, point.queries, point.heads, -1)
    return partial(
        flash_attn_with_kvcache, query, keys, values, cache_seqlens=full.seq_lens, causal=True
    )


def vllm_flash_attn(full: FullInputs) -> Callable[[], object]:
    """vLLM's, of the version that it takes by default on this GPU (3 on Hopper)."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    point = full.point
    version = get_flash_attn_version()
    if version is None:
        raise RuntimeError("vLLM has no FlashAttention for this GPU")
    return partial(
        flash_attn_varlen_func,
        **{"q": full.query, "k": full.keys, "v": full.values, "out": full.output},
        max_seqlen_q=point.queries,
        cu_seqlens_q=full.query_start_loc,
        max_seqlen_k=point.context,
        seqused_k=full.seq_lens,
        softmax_scale=point.head_size**-0.5,
        causal=True,
        block_table=full.block_table,
        fa_version=version,
    )


def _vllm_triton(full: FullInputs) -> dict[str, Any]:
    """Arguments that both of vLLM's Triton kernels take."""
    threshold, buffers = full.segments()
    options: dict[str, Any] = {"q": full.query, "k": full.keys, "v": full.values}
    options |= dict.fromkeys(("q_descale", "k_descale", "v_descale"))
    return options | {
        "out": full.output,
        "cu_seqlens_q": full.query_start_loc,
        "seqused_k": full.seq_lens,
        "softmax_scale": full.point.head_size**-0.5,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": full.block_table,
        "softcap": 0,
        "max_seqlen_q": full.point.queries,
        "seq_threshold_3D": threshold,
        **buffers,
    }


def triton_attn(full: FullInputs) -> Callable[[], object]:
    """vLLM's TRITON_ATTN."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    return partial(unified_attention, max_seqlen_k=full.point.context, **_vllm_triton(full))


def triton_attn_diffkv(full: FullInputs) -> Callable[[], object]:
    """vLLM's TRITON_ATTN_DIFFKV over keys and values of the ranks: folded keys need no more."""
    from vllm.v1.attention.ops.triton_unified_attention_diffkv import unified_attention_diffkv

    point = full.point
    if point.key_mode.reconstructs_keys or point.bits != 16:
        raise ValueError("DIFFKV reads latents of 16 bits that are scored as they are")
    rank_k, rank_v = point.ranks
    options = _vllm_triton(full)
    # Side by side, as it expects them.
    packed = torch.cat([full.keys[..., :rank_k], full.values[..., :rank_v]], dim=-1)
    options |= {
        "q": full.query[..., :rank_k].contiguous(),
        "k": packed[..., :rank_k],
        "v": packed[..., rank_k:],
        "out": full.output[..., :rank_v].contiguous(),
    }
    return partial(unified_attention_diffkv, **options)


BASELINES: dict[str, Callable[[FullInputs], Callable[[], object]]] = {
    "torch_sdpa": torch_sdpa,
    "flash_attn": flash_attn,
    "vllm_flash_attn": vllm_flash_attn,
    "triton_attn": triton_attn,
    "triton_attn_diffkv": triton_attn_diffkv,
}
