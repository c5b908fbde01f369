# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for CUDA GPUs: attention that reads the latents once.

Blocks of the KV cache are token-major ("diffkv"), as in `reference.py` and vLLM's own kernels, and
where they hold codes in rows of units (`coded/layout.py`).
Which kernel serves a sequence depends on that sequence alone: up to `Tuning.max_decode` queries go
to the decode kernel (splits of a fixed number of keys), more to the prefill kernel, in one mixed
batch. No call waits for the device, and every size comes from shapes and from what the host knows
of the step, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton

from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.gpu.checks import check_layer, check_step
from vllm_eigen.kernels.gpu.coded.codes import swaps_values
from vllm_eigen.kernels.gpu.coded.layer import CodedGpuLayer, key_tiles, value_tiles
from vllm_eigen.kernels.gpu.coded.layout import padded_codes
from vllm_eigen.kernels.gpu.coded.reconstruct import by_planes
from vllm_eigen.kernels.gpu.layer import GpuLayer
from vllm_eigen.kernels.gpu.padding import Padding, compiled_sizes
from vllm_eigen.kernels.gpu.plain.attention import paged_attention_kernel
from vllm_eigen.kernels.gpu.plain.reconstruct import PackedRotary, pack, pack_rotary
from vllm_eigen.kernels.gpu.plan import GpuPlan
from vllm_eigen.kernels.gpu.tiles import (
    HOPPER_SHARED_BYTES,
    Shape,
    Tuning,
    fit,
    fit_decode,
    padded_pairs,
    reads_shared,
)
from vllm_eigen.kernels.gpu.warm_up import warm_up
from vllm_eigen.kernels.gpu.workspace import Workspace
from vllm_eigen.kernels.interface import LayerSpec, Limits, PlanGeometry, PreparedLayer, Step
from vllm_eigen.kernels.rope import RotaryTable

MAX_SPLITS = 128
"""Splits of a sequence at most; longer block tables take larger splits."""

_INTERPRETED = not isinstance(paged_attention_kernel, triton.runtime.JITFunction)


class GpuKernels:
    """See `interface.Kernels`.

    Raises:
        KernelError: there is no CUDA device and Triton does not interpret.
    """

    name = "gpu"
    supports_graphs = True

    def __init__(self, tuning: Tuning | None = None) -> None:
        if not (_INTERPRETED or torch.cuda.is_available()):
            raise KernelError(
                "the gpu kernels need a CUDA device (or TRITON_INTERPRET=1 to check them slowly on"
                " the CPU); choose EIGEN_KERNELS=cpu or reference"
            )
        self.tuning = tuning or Tuning()
        self.workspace = Workspace()
        self._shared_bytes = HOPPER_SHARED_BYTES
        if torch.cuda.is_available():
            device: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
            self._shared_bytes = device.shared_memory_per_block_optin
        self._rotary: dict[RotaryTable, PackedRotary] = {}

    def prepare(self, layer: LayerSpec) -> GpuLayer:
        """See `interface.Kernels.prepare`."""
        check_layer(layer)
        sizes = compiled_sizes(layer)
        packed = None
        if (reconstruction := layer.reconstruction) is not None:
            rotary = reconstruction.rotary
            if rotary not in self._rotary:
                self._rotary[rotary] = pack_rotary(rotary)
            rows = layer.rank_k if layer.is_coded else sizes.padding.key
            packed = pack(reconstruction, self._rotary[rotary], _basis_dtype(layer), rows)
        shape = _shape(layer, sizes.padding)
        if packed is not None and layer.key_code:
            packed = by_planes(packed, layer.key_code, key_tiles(sizes.padding))
        decode, decode_heads = fit_decode(self.tuning, shape, self._shared_bytes)
        kind = CodedGpuLayer if layer.is_coded else GpuLayer
        return kind(
            spec=layer,
            shape=shape,
            sizes=sizes,
            tuning=self.tuning,
            decode=decode,
            decode_heads=decode_heads,
            prefill=fit(
                self.tuning.prefill, shape.heads_per_reconstructed, shape, self._shared_bytes
            ),
            packed=packed,
            workspace=self.workspace,
            reads_shared=reads_shared(self._shared_bytes),
        )

    def reserve(self, limits: Limits, layers: Sequence[PreparedLayer]) -> None:
        """See `interface.Kernels.reserve`."""
        for layer in layers:
            if isinstance(layer, GpuLayer):
                layer.reserve(limits, self._split_size(limits.max_seq_len))

    def warm_up(self, limits: Limits, layers: Sequence[PreparedLayer], block_size: int) -> None:
        """See `interface.Kernels.warm_up`."""
        for layer in layers:
            if isinstance(layer, GpuLayer):
                warm_up(self, layer, block_size, limits.device)

    def plan(self, step: Step, geometry: PlanGeometry) -> GpuPlan:
        """See `interface.Kernels.plan`. Reads shapes and the host's bounds, not the device."""
        check_step(step)
        width = step.block_table.shape[1] * geometry.block_size
        max_query_len = min(step.num_actual_tokens, step.max_query_len or step.num_actual_tokens)
        return GpuPlan(
            step,
            geometry,
            max_query_len=max_query_len,
            max_decode_query_len=self._max_decode_query_len(step, max_query_len),
            max_seq_len=min(width, step.max_seq_len or width),
            split_size=self._split_size(width),
        )

    def _max_decode_query_len(self, step: Step, max_query_len: int) -> int:
        """Queries of a decoded sequence at most. Beside a prompt most have one, and room for
        max_decode would launch many programs that have nothing to do."""
        most = self.tuning.max_decode
        if max_query_len <= most or step.query_start_loc_cpu is None:
            return min(max_query_len, most)
        starts = step.query_start_loc_cpu.tolist()
        lengths = (end - start for start, end in pairwise(starts))
        return max((length for length in lengths if length <= most), default=0)

    def _split_size(self, width: int) -> int:
        """Keys of a split, a multiple of every tile. It depends on the width of the block table in
        tokens, which an engine never changes: a sequence's arithmetic does not know its batch."""
        needed: int = triton.next_power_of_2(triton.cdiv(width, MAX_SPLITS))
        tuning = self.tuning
        tiles = (
            *(tuning.decode, tuning.decode_reconstruct),
            *(tuning.decode_coded, tuning.decode_coded_reconstruct),
        )
        return max(self.tuning.decode_split, needed, *(tile.block_n for tile in tiles))


def _basis_dtype(layer: LayerSpec) -> torch.dtype:
    """That of latents as operands of a product: e4m3 is made float16 sooner than bfloat16."""
    return torch.float16 if layer.is_fp8 and layer.dtype.itemsize == 2 else layer.dtype


def _shape(layer: LayerSpec, padding: Padding) -> Shape:
    """Head counts, ranks and element sizes of a layer."""
    columns = 0
    if layer.reconstruction is not None:
        pairs, unrotated = padded_pairs(layer.reconstruction)
        columns = 2 * pairs + unrotated
    if layer.is_coded:
        of_key, of_value = key_tiles(padding), value_tiles(padding)
        numbers = padded_codes(of_key), padded_codes(of_value)
        cached_bytes = sum(2 * tile.units for tile in (*of_key, *of_value))
        # Planes are multiplied one after the other.
        widest = max(tile.units for tile in (*of_key, *of_value))
        operands = 4 * widest
        unswapped = max([0, *(t.units * t.planes for t in of_value if not swaps_values(t, True))])
    else:
        numbers = padding.key, padding.value
        cached_bytes = sum(numbers) * layer.cache_dtype.itemsize
        widest = max(numbers)
        is_operand = layer.cache_dtype == layer.dtype and layer.dtype.itemsize < 4
        operands = unswapped = 0 if is_operand else sum(numbers)
    return Shape(
        num_heads=layer.num_heads,
        heads_per_latent=layer.num_heads // layer.num_kv_heads,
        heads_per_reconstructed=layer.num_heads // layer.num_key_heads,
        rank_k=layer.rank_k,
        rank_v=layer.rank_v,
        numbers_k=numbers[0],
        numbers_v=numbers[1],
        cached_bytes=cached_bytes,
        is_coded=layer.is_coded,
        operands=operands,
        unswapped=unswapped,
        columns=columns,
        widest=max(widest, columns),
        element_size=layer.dtype.itemsize,
    )
