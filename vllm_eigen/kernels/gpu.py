"""Triton kernels for CUDA GPUs: attention that reads the latents once.

Pages are token-major ("diffkv"), as in `reference.py` and vLLM's own kernels. Which kernel serves a
sequence depends on that sequence alone: short runs of queries go to the decode kernel (splits of a
fixed number of keys), long ones to the prefill kernel, in one mixed batch. Nothing here waits for
the device, and every size comes from shapes, so a step can be captured in a CUDA graph.

Keys are rebuilt inside both kernels. Rebuilding once into scratch memory would cost prefill less
arithmetic, but the scratch has the size of the uncompressed keys of the whole batch, which is what
the latent cache exists to avoid, and that size is known on the device only.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import triton

from vllm_eigen.errors import KernelError

from .gpu_checks import check_attend, check_write, typed_pages
from .interface import FP8_DTYPES, Encode, Rebuild, ScoreOptions
from .triton_attend import attend_tile, merge_splits
from .triton_interpreter import repair_interpreter
from .triton_rebuild import FAR_STEP, PackedRebuild, pack
from .triton_tiles import (
    HOPPER_SHARED_BYTES,
    MIN_DOT,
    Tile,
    Tuning,
    fit,
    fit_decode,
    padded,
    rank_chunks,
)
from .triton_write import encode_latents, write_latents

_MAX_SPLITS = 128
_ENCODED_TOKENS = 64
_INTERPRETED = not isinstance(attend_tile, triton.runtime.JITFunction)


class GpuKernels:
    """See `interface.Kernels`.

    Raises KernelError where there is no CUDA device and Triton does not interpret.
    """

    name = "gpu"

    def __init__(self, tuning: Tuning | None = None) -> None:
        if not (_INTERPRETED or torch.cuda.is_available()):
            raise KernelError(
                "the gpu kernels need a CUDA device (or TRITON_INTERPRET=1 to check them slowly on"
                " the CPU); choose VLLM_EIGEN_KERNELS=cpu or reference"
            )
        if _INTERPRETED:
            repair_interpreter()
        self.tuning = tuning or Tuning()
        self._shared_bytes = HOPPER_SHARED_BYTES
        if torch.cuda.is_available():
            device: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
            self._shared_bytes = device.shared_memory_per_block_optin
        self._packed: weakref.WeakKeyDictionary[Rebuild, dict[torch.dtype, PackedRebuild]] = (
            weakref.WeakKeyDictionary()
        )

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        encode: Encode | None = None,
    ) -> None:
        """See `interface.Kernels.write_cache`."""
        pages = typed_pages(kv_cache)
        num_tokens, num_heads = slot_mapping.shape[0], pages.shape[1]
        rank_k, rank_v = check_write(key, value, pages, num_tokens, encode)
        if num_tokens == 0:
            return
        block_rank = triton.next_power_of_2(max(rank_k, rank_v))
        places = pages, slot_mapping
        strides = (
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            pages.stride(0),
            pages.stride(1),
        )
        shape = {
            "rank_k": rank_k,
            "rank_v": rank_v,
            "page_size": pages.shape[2],
            "fp8_limit": torch.finfo(pages.dtype).max if pages.dtype in FP8_DTYPES else 0.0,
        }
        if encode is not None:
            # The same tile for any number of tokens: a token's latents do not depend on company.
            encode_latents[(triton.cdiv(num_tokens, _ENCODED_TOKENS), num_heads, 2)](
                key,
                value,
                encode.key,
                encode.key if encode.value is None else encode.value,
                *places,
                num_tokens,
                *strides,
                k_scale,
                v_scale,
                **shape,
                key_size=key.shape[2],
                value_size=value.shape[2],
                encodes_values=encode.value is not None,
                block_tokens=_ENCODED_TOKENS,
                block_size=min(64, padded(max(key.shape[2], value.shape[2]))),
                block_rank=max(MIN_DOT, block_rank),
                precision=_precision(key.dtype),
                num_warps=4 if block_rank <= 128 else 8,
                num_stages=1,
            )
            return
        block_heads = min(triton.next_power_of_2(num_heads), max(1, 2048 // block_rank))
        write_latents[(num_tokens, triton.cdiv(num_heads, block_heads))](
            key,
            value,
            *places,
            *strides,
            k_scale,
            v_scale,
            **shape,
            num_heads=num_heads,
            block_heads=block_heads,
            block_rank=block_rank,
        )

    def prepare(self, rebuild: Rebuild, dtype: torch.dtype, num_heads: int) -> PackedRebuild:
        """Pack `rebuild` for queries of `dtype`, once; `attend` does so at its first call.

        It waits for the device, so it must have happened before a CUDA graph is captured: raises
        KernelError otherwise.
        """
        packed = self._packed.setdefault(rebuild, {})
        if dtype not in packed:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise KernelError(
                    "a CUDA graph is being captured but the key basis was never packed: call"
                    " GpuKernels.prepare, or attend once, before the capture"
                )
            packed[dtype] = pack(rebuild, dtype)
        return packed[dtype]

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        options: ScoreOptions,
        rebuild: Rebuild | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        *,
        max_query_len: int | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        """See `interface.Kernels.attend`.

        max_query_len and max_seq_len, upper bounds known on the host (in a captured graph: for all
        of its replays), spare launches that would find nothing to do. They change no result.
        """
        pages = typed_pages(kv_cache)
        shape = check_attend(query, pages, output, block_table, options, rebuild)
        num_tokens, num_seqs = query.shape[0], seq_lens.shape[0]
        if num_tokens == 0 or num_seqs == 0:
            return
        longest_query = min(num_tokens, max_query_len or num_tokens)
        width = block_table.shape[1] * pages.shape[2]
        longest = min(width, max_seq_len or width)
        split_size = self._split_size(width)
        tuning = self.tuning
        decode, decode_heads = fit_decode(tuning, shape, self._shared_bytes)
        prefill = fit(tuning.prefill, shape.heads_per_rebuilt, shape, self._shared_bytes)
        max_decode = min(tuning.max_decode, decode.block_m // decode_heads)
        num_slots = min(max_decode, longest_query)
        seen = longest
        if options.sliding_window is not None:
            # Wherever they begin, the keys of a window touch at most one split more.
            seen = min(longest, options.sliding_window + max_decode + split_size)
        num_splits = triton.cdiv(seen, split_size)

        packed = None if rebuild is None else self.prepare(rebuild, query.dtype, query.shape[1])
        is_fp8 = pages.dtype in FP8_DTYPES
        k_head, k_tail = rank_chunks(shape.rank_k)
        v_head, v_tail = rank_chunks(shape.rank_v)
        rows = (num_seqs, num_slots, shape.num_heads, num_splits) if num_splits > 1 else (0,)
        partials = _Partials.allocate(rows, v_head + v_tail, query.device)

        def launch(tile: Tile, is_decode: bool) -> None:
            heads = decode_heads if is_decode else shape.heads_per_rebuilt
            blocks = num_seqs if is_decode else num_tokens // (tile.block_m // heads) + num_seqs
            relative = is_decode and tuning.relative_rotation and packed is not None
            relative = relative and packed is not None and packed.near is not None
            attend_tile[(blocks * (shape.num_heads // heads), num_splits if is_decode else 1)](
                query,
                pages,
                output,
                partials.sums,
                partials.peaks,
                partials.totals,
                query_start_loc,
                seq_lens,
                block_table,
                options.alibi_slopes,
                packed.basis if packed else None,
                packed.offset if packed else None,
                packed.near if packed else None,
                packed.far if packed else None,
                packed.table if packed else None,
                num_seqs,
                num_slots,
                num_splits,
                split_size,
                query.stride(0),
                query.stride(1),
                output.stride(0),
                output.stride(1),
                pages.stride(0),
                pages.stride(1),
                block_table.stride(0),
                options.scale,
                options.soft_cap or 1.0,
                k_scale,
                v_scale,
                num_heads=shape.num_heads,
                heads_per_tile=heads,
                tiles_per_latent=shape.heads_per_latent // heads,
                rebuilt_per_tile=heads // shape.heads_per_rebuilt,
                rank_k=shape.rank_k,
                rank_v=shape.rank_v,
                k_head=k_head,
                k_tail=k_tail,
                v_head=v_head,
                v_tail=v_tail,
                page_size=pages.shape[2],
                window=options.sliding_window or 0,
                has_cap=options.soft_cap is not None,
                is_fp8=is_fp8,
                rebuild=packed is not None,
                relative=relative,
                far_step=FAR_STEP,
                is_neox=rebuild is not None and rebuild.is_neox_style,
                rotary_dim=rebuild.rotary_dim if rebuild else 0,
                head_size=query.shape[2],
                half=packed.half if packed else 0,
                rest=packed.rest if packed else 0,
                is_decode=is_decode,
                max_decode=max_decode,
                swap=tile.swap,
                block_m=tile.block_m,
                block_n=tile.block_n,
                precision=_precision(query.dtype),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )

        launch(decode, is_decode=True)
        if num_splits > 1:
            merge_splits[(shape.num_heads, num_seqs)](
                output,
                partials.sums,
                partials.peaks,
                partials.totals,
                query_start_loc,
                seq_lens,
                num_slots,
                num_splits,
                split_size,
                output.stride(0),
                output.stride(1),
                v_scale if is_fp8 else 1.0,
                num_heads=shape.num_heads,
                rank_v=shape.rank_v,
                v_width=v_head + v_tail,
                block_v=triton.next_power_of_2(v_head + v_tail),
                window=options.sliding_window or 0,
                max_decode=max_decode,
                block_splits=16,
            )
        if longest_query > max_decode:
            launch(prefill, is_decode=False)

    def _split_size(self, width: int) -> int:
        """Keys a split, for sequences of at most `width` keys: a multiple of every tile."""
        needed: int = triton.next_power_of_2(triton.cdiv(width, _MAX_SPLITS))
        tiles = self.tuning.decode, self.tuning.decode_rebuild
        return max(self.tuning.decode_split, needed, *(tile.block_n for tile in tiles))


@dataclass(frozen=True)
class _Partials:
    """Float32 scratch of `attend_tile`, one row a (sequence, query, head, split)."""

    sums: torch.Tensor
    peaks: torch.Tensor
    totals: torch.Tensor

    @classmethod
    def allocate(cls, rows: tuple[int, ...], width: int, device: torch.device) -> _Partials:
        """Uninitialised `[*rows, width]`, `rows` and `rows`."""
        sizes = (*rows, width), rows, rows
        return cls(*(torch.empty(size, dtype=torch.float32, device=device) for size in sizes))


def _precision(dtype: torch.dtype) -> str:
    """How Triton multiplies float32: in three parts, for one is too coarse."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
