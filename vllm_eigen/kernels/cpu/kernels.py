# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels behind `interface.Kernels`: what is checked and packed before they run.

The library is compiled by `build.py` and called by `bindings.py`. Cache blocks are laid out as
`csrc/plain/block.h` and `csrc/coded/layout.h` say.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.cpu import abi, build
from vllm_eigen.kernels.cpu.bindings import Library, PlanHandle
from vllm_eigen.kernels.cpu.pack import PackedReconstruction, Target, pack, pack_table
from vllm_eigen.kernels.interface import (
    LayerSpec,
    Limits,
    Plan,
    PlanGeometry,
    PreparedLayer,
    Step,
)
from vllm_eigen.kernels.rope import RotaryTable

RECONSTRUCT_BF16_FLAG = "-DVLLM_EIGEN_RECONSTRUCT_BF16"


class CpuKernels:
    """See `interface.Kernels`. A row's output depends on its sequence alone (README.md)."""

    name = "cpu"
    supports_graphs = False

    def __init__(self, isa: str | None = None, extra_flags: tuple[str, ...] = ()) -> None:
        """Load the library for `isa` (default: EIGEN_CPU_ISA, else the machine's best).

        `extra_flags` go to the compiler and the linker (sanitizers).

        Raises:
            KernelError: it cannot be built or loaded here.
        """
        self.isa = isa or build.chosen_isa()
        self._bindings = Library(self.isa, extra_flags)
        self._tables: dict[RotaryTable, torch.Tensor] = {}

    def prepare(self, layer: LayerSpec) -> CpuLayer:
        """See `interface.Kernels.prepare`."""
        _check_layer(layer)
        packed = None
        if layer.reconstruction is not None:
            rotary = layer.reconstruction.rotary
            if rotary not in self._tables:
                self._tables[rotary] = pack_table(rotary)
            has_integers = self._bindings.has_integer_keys and layer.dtype == torch.bfloat16
            code = layer.key_code if has_integers else None
            target = Target(
                in_bf16=self._bindings.reconstructs_bf16
                and (layer.cache_dtype == torch.bfloat16 or code is not None),
                dtype=layer.dtype,
                queries_per_head=layer.num_heads // layer.num_key_heads,
                integers_for=code,
                in_bytes=self._bindings.has_keys_in_bytes,
                tile_units=self._bindings.tile_units,
            )
            packed = pack(layer.reconstruction, target, self._tables[rotary])
        return CpuLayer.make(layer, self._bindings, packed)

    def reserve(self, limits: Limits, layers: Sequence[PreparedLayer]) -> None:
        """See `interface.Kernels.reserve`: these allocate as they go."""

    def warm_up(self, limits: Limits, layers: Sequence[PreparedLayer], block_size: int) -> None:
        """See `interface.Kernels.warm_up`: these were compiled when they were loaded."""

    def plan(self, step: Step, geometry: PlanGeometry) -> CpuPlan:
        """See `interface.Kernels.plan`."""
        starts, lengths, blocks = step.query_start_loc, step.seq_lens, step.block_table
        for name in ("query_start_loc", "seq_lens", "block_table"):
            table = getattr(step, name)
            _check(
                table.dtype == torch.int32 and (table.numel() < 2 or table.stride(-1) == 1),
                f"{name} must be int32, its last dimension contiguous",
            )
        num_seqs = lengths.shape[0]
        _check(
            starts.shape[0] == num_seqs + 1 and blocks.shape[0] == num_seqs,
            "query_start_loc, seq_lens and block_table disagree on the number of sequences",
        )
        _check(
            geometry.block_size % abi.BLOCK_MULTIPLE == 0,
            f"cache blocks must hold a multiple of {abi.BLOCK_MULTIPLE} tokens,"
            f" not {geometry.block_size}",
        )
        args = abi.StepArgs(
            query_start_loc=starts.data_ptr(),
            seq_lens=lengths.data_ptr(),
            block_table=blocks.data_ptr(),
            num_seqs=num_seqs,
            block_table_stride=blocks.stride(0),
            block_table_width=blocks.shape[1],
            num_heads=geometry.num_heads,
            num_key_heads=geometry.num_key_heads,
            block_size=geometry.block_size,
            reconstructs=geometry.reconstructs_keys,
            threads=torch.get_num_threads(),
        )
        return CpuPlan(step, geometry, self._bindings.plan(args))


@dataclass(frozen=True, eq=False)
class CpuPlan(Plan):
    """Work items in C++ memory; they hold a copy of the step's tables."""

    handle: PlanHandle


@dataclass(frozen=True, eq=False)
class CpuLayer:
    """See `interface.PreparedLayer`.

    args: what the library reads of the layer; `pointed_to` are the structures it points into, and
        those point into `packed`.
    """

    spec: LayerSpec
    bindings: Library
    packed: PackedReconstruction | None
    args: abi.LayerArgs
    pointed_to: tuple[ctypes.Structure, ...]

    @classmethod
    def make(
        cls, spec: LayerSpec, library: Library, packed: PackedReconstruction | None
    ) -> CpuLayer:
        """The layer with the structures that point into `packed`."""
        pointed_to: tuple[ctypes.Structure, ...] = ()
        if packed is not None:
            absorb = None if packed.absorbed is None else packed.absorbed.args()
            reconstruct = packed.args(absorb)
            pointed_to = (reconstruct,) if absorb is None else (reconstruct, absorb)
        codes = [
            None if code is None else _code_args(code) for code in (spec.key_code, spec.value_code)
        ]
        scores, slopes = spec.scores, spec.scores.alibi_slopes
        args = abi.LayerArgs(
            type=abi.QUERY_TYPES[spec.dtype],
            cache_type=abi.CODES if spec.is_coded else abi.CACHE_TYPES[spec.cache_dtype],
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            rank_k=spec.rank_k,
            rank_v=spec.rank_v,
            query_size=spec.query_size,
            k_scale=spec.k_scale if spec.is_fp8 else 1.0,
            v_scale=spec.v_scale if spec.is_fp8 else 1.0,
            scale=scores.scale,
            soft_cap=scores.soft_cap or 0.0,
            window=scores.sliding_window or 0,
            alibi_slopes=None if slopes is None else slopes.data_ptr(),
            reconstruct=ctypes.addressof(pointed_to[0]) if pointed_to else None,
            key_code=None if codes[0] is None else ctypes.addressof(codes[0]),
            value_code=None if codes[1] is None else ctypes.addressof(codes[1]),
        )
        pointed_to += tuple(code for code in codes if code is not None)
        return cls(spec, library, packed, args, pointed_to)

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """See `interface.PreparedLayer.write_cache`."""
        spec = self.spec
        if spec.down_projection is not None:
            key, value = spec.down_projection.latents(key, value)
        num_tokens = slot_mapping.shape[0]
        for name, rows, rank in (("key", key, spec.rank_k), ("value", value, spec.rank_v)):
            if (
                rows.dtype not in abi.QUERY_TYPES
                or rows.dtype != key.dtype
                or rows.shape[0] < num_tokens
                or rows.shape[1:] != (spec.num_kv_heads, rank)
                or rows.stride(2) != 1
            ):
                raise KernelError(
                    f"{name} must be [{num_tokens} or more, {spec.num_kv_heads}, {rank}], the last"
                    f" dimension contiguous; it is {key.dtype} {list(rows.shape)}"
                )
        if slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous():
            raise KernelError("slot_mapping must be contiguous int64")
        self.bindings.write_cache(
            abi.WriteArgs(
                layer=ctypes.addressof(self.args),
                cache=self._cache(kv_cache),
                key=key.data_ptr(),
                value=value.data_ptr(),
                type=abi.QUERY_TYPES[key.dtype],
                key_token_stride=key.stride(0),
                key_head_stride=key.stride(1),
                value_token_stride=value.stride(0),
                value_head_stride=value.stride(1),
                slots=slot_mapping.data_ptr(),
                num_tokens=num_tokens,
                threads=torch.get_num_threads(),
            )
        )

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor, plan: Plan
    ) -> None:
        """See `interface.PreparedLayer.attend`."""
        spec = self.spec
        if not isinstance(plan, CpuPlan):
            raise KernelError("the plan was made by other kernels")
        num_tokens = query.shape[0]
        if (
            query.dtype != spec.dtype
            or query.shape[1:] != (spec.num_heads, spec.query_size)
            or query.stride(2) != 1
        ):
            raise KernelError(
                f"query {query.dtype} {list(query.shape)} does not fit a layer of {spec.num_heads}"
                f" {spec.dtype} heads of size {spec.query_size}"
            )
        if (
            output.dtype != spec.dtype
            or output.shape != (num_tokens, spec.num_heads, spec.rank_v)
            or output.stride(2) != 1
        ):
            raise KernelError(
                f"output {output.dtype} {list(output.shape)} does not fit query {list(query.shape)}"
            )
        self.bindings.attend(
            abi.AttendArgs(
                layer=ctypes.addressof(self.args),
                cache=self._cache(kv_cache),
                query=query.data_ptr(),
                output=output.data_ptr(),
                num_tokens=num_tokens,
                query_token_stride=query.stride(0),
                query_head_stride=query.stride(1),
                output_token_stride=output.stride(0),
                output_head_stride=output.stride(1),
            ),
            plan.handle,
        )

    def _cache(self, kv_cache: torch.Tensor) -> abi.CacheArgs:
        spec = self.spec
        num_blocks, num_kv_heads, block_size, width = kv_cache.shape
        strides = kv_cache.stride()
        is_bytes = kv_cache.dtype == torch.uint8 and spec.is_fp8
        if (
            (kv_cache.dtype != spec.cache_dtype and not is_bytes)
            or num_kv_heads != spec.num_kv_heads
            or width != spec.key_width + spec.value_width
            or block_size % abi.BLOCK_MULTIPLE
            or strides[2:] != (width, 1)
        ):
            raise KernelError(
                f"kv_cache {kv_cache.dtype} {list(kv_cache.shape)} must be {spec.cache_dtype}"
                f" blocks of {spec.num_kv_heads} heads of width {spec.key_width} +"
                f" {spec.value_width}, each head contiguous, of a multiple of {abi.BLOCK_MULTIPLE}"
                f" tokens"
            )
        return abi.CacheArgs(kv_cache.data_ptr(), strides[0], strides[1], num_blocks, block_size)


def _code_args(code: Code) -> abi.CodeArgs:
    return abi.CodeArgs(code.eight, code.four, code.two, code.token_scale, code.scale_floor)


def _check_layer(layer: LayerSpec) -> None:
    _check(layer.dtype in abi.QUERY_TYPES, f"the CPU kernels do not compute in {layer.dtype}")
    _check(
        layer.cache_dtype in abi.CACHE_TYPES,
        f"the CPU kernels do not know a cache of {layer.cache_dtype}",
    )
    _check(min(layer.rank_k, layer.rank_v) > 0, "ranks must be positive")
    _check(
        not layer.is_coded or max(layer.rank_k, layer.rank_v) <= abi.MOST_CODES,
        f"a coded latent holds at most {abi.MOST_CODES} directions",
    )
    _check(
        layer.num_heads % layer.num_key_heads == 0
        and layer.num_key_heads % layer.num_kv_heads == 0,
        f"{layer.num_heads} query heads, {layer.num_key_heads} key heads and"
        f" {layer.num_kv_heads} heads in the cache do not divide one another",
    )
    slopes = layer.scores.alibi_slopes
    _check(
        slopes is None
        or (
            (slopes.dtype == torch.float32 and slopes.shape == (layer.num_heads,))
            and slopes.is_contiguous()
        ),
        f"alibi_slopes must be contiguous float32 [{layer.num_heads}]",
    )
    if layer.reconstruction is not None:
        basis = layer.reconstruction.key_basis
        _check(
            basis.dim() == 3 and basis.shape[1] == layer.rank_k,
            f"key_basis {list(basis.shape)} does not fit rank_k {layer.rank_k}",
        )


def _check(fits: bool, problem: str) -> None:
    if not fits:
        raise KernelError(problem)
