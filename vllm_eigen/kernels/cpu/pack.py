# SPDX-License-Identifier: Apache-2.0
"""`KeyReconstruction` as the C++ kernels read it: RoPE pairs side by side, 32-bit units, tables by
token. Made once a layer, by `CpuKernels.prepare`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch.nn import functional

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.cpu.abi import ROW_MULTIPLE, TABLE_TOKENS, AbsorbArgs, ReconstructArgs
from vllm_eigen.kernels.cpu.absorb import (
    PAIRS_AT_ONCE,
    FrequencyBasis,
    find_frequency_basis,
    tolerance,
)
from vllm_eigen.kernels.cpu.integers import IntegerRows
from vllm_eigen.kernels.interface import KeyReconstruction
from vllm_eigen.kernels.rope import RotaryTable, pair_order

BYTES_IN_BFLOAT16 = 2.0
"""Products of bytes in the time of one in bfloat16."""
BYTES_ON_TILES = 2.5
"""Products of bytes on matrix units, rotation included, in the time of one without them."""
BYTES_IN_FLOAT32 = 2.5
"""Products of bytes, added up in pairs, in the time of one in float32."""


@dataclass(frozen=True)
class Target:
    """What packing depends on besides the `KeyReconstruction`.

    in_bf16: keys are made in bfloat16, otherwise in float32.
    dtype: of the queries. queries_per_head: query heads that share a reconstructed one.
    integers_for: the latents' code, where keys are reconstructed in integers; otherwise None.
    in_bytes: those are bytes even where they meet 8-bit codes.
    tile_units: units of a row of a matrix unit's operand; 1 without matrix units.
    """

    in_bf16: bool
    dtype: torch.dtype
    queries_per_head: int
    integers_for: Code | None = None
    in_bytes: bool = True
    tile_units: int = 1


@dataclass(frozen=True, eq=False)
class Absorbed:
    """Tensors that AbsorbArgs (args.h) points into.

    basis: float32 `[num_heads, 2 * slow pairs, rank_k rounded up]`, of each band x, then y; or
        bfloat16 `[num_heads, slow pairs, rank_k rounded up, 2]`, two rows of it side by side.
    coefficients: float32, of all bands one after the other.
    bands: int64 `[num_bands, 2]`, pairs and functions of each.
    """

    frequency_basis: FrequencyBasis
    basis: torch.Tensor
    coefficients: torch.Tensor
    bands: torch.Tensor

    def args(self) -> AbsorbArgs:
        """Pointers, valid as long as this object."""
        functions = self.frequency_basis.functions
        return AbsorbArgs(
            basis=self.basis.data_ptr(),
            functions=functions.data_ptr(),
            coefficients=self.coefficients.data_ptr(),
            bands=self.bands.data_ptr(),
            num_bands=self.bands.shape[0],
            num_functions=functions.shape[0],
            direct_pairs=self.frequency_basis.direct_pairs,
            basis_stride=self.basis.shape[2],
        )


@dataclass(frozen=True, eq=False)
class PackedReconstruction:
    """Tensors that ReconstructArgs (args.h) points into.

    basis: `[num_heads, 2 * pairs, units]`, two bfloat16 or one float32 a unit; rows follow `order`.
    offset: float32 `[num_heads, 2 * pairs]`, or None.
    order: int32 `[2 * pairs]`, the head dimension of each row, -1 where a pair is padded.
    depth: int32 `[pairs]`, the units of a row after which all are zero, up to this pair.
    table: float32 `[positions / 16, rotary_pairs, 2, 16]`, cosines then sines of 16 positions.
    absorbed: how a single query does without reconstructing its slow pairs; None if it cannot.
    integers: None, or `basis` is that of these.
    """

    basis: torch.Tensor
    offset: torch.Tensor | None
    order: torch.Tensor
    depth: torch.Tensor
    table: torch.Tensor
    positions: int
    absorbed: Absorbed | None
    integers: IntegerRows | None = None

    def args(self, absorb: AbsorbArgs | None) -> ReconstructArgs:
        """Pointers, valid as long as this object and `absorb`, those of `absorbed`."""
        integers = self.integers
        return ReconstructArgs(
            basis=self.basis.data_ptr(),
            offset=None if self.offset is None else self.offset.data_ptr(),
            order=self.order.data_ptr(),
            depth=self.depth.data_ptr(),
            cos_sin=self.table.data_ptr(),
            num_heads=self.basis.shape[0],
            pairs=self.basis.shape[1] // 2,
            rotary_pairs=self.table.shape[1],
            positions=self.positions,
            absorb=None if absorb is None else ctypes.addressof(absorb),
            row_scale=None if integers is None else integers.scale.data_ptr(),
            row_offset=None if integers is None else integers.offset.data_ptr(),
            low_units=0 if integers is None else integers.low_units,
        )


def pack(
    reconstruction: KeyReconstruction, target: Target, table: torch.Tensor
) -> PackedReconstruction:
    """`reconstruction` in the kernels' order; `table` is its rotary table by `pack_table`."""
    rotary, head_size = reconstruction.rotary, reconstruction.key_basis.shape[2]
    order = pair_order(head_size, rotary.rotary_dim, rotary.is_neox_style)
    chosen, present = order.clamp_min(0), (order >= 0)
    basis = reconstruction.key_basis.float().transpose(1, 2)[:, chosen] * present[:, None]
    offset = reconstruction.key_offset
    if offset is not None:
        offset = (offset.float()[:, chosen] * present).contiguous()
    depth = _depth(basis)
    cost = _reconstruction_cost(depth, basis.shape[2])
    if (code := target.integers_for) is not None:
        # Every row reads every latent, and absorbed queries are bytes as the rows are.
        cost = tuple(2.0 * pairs for pairs in range(len(depth) + 1))
    frequency_basis = find_frequency_basis(
        _frequencies(rotary) + (0.0,) * (order.shape[0] // 2 - rotary.rotary_dim // 2),
        cost,
        target.queries_per_head,
        tolerance(target.dtype),
        1.0 if code is None else _absorbing_product(code, target),
    )
    absorbed = None
    if frequency_basis is not None:
        absorbed = _absorb(frequency_basis, basis, code is not None and target.in_bf16)
    # The last pair reads every latent: a NaN in one whose basis is zero must reach the score.
    depth[-1] = basis.shape[2]
    integers = None
    if code is not None:
        integers = IntegerRows.of(basis, code, target.in_bytes, target.tile_units)
        basis = integers.basis
    elif target.in_bf16:
        basis = functional.pad(basis, (0, basis.shape[2] % 2)).bfloat16()
        depth = (depth + 1) // 2
    return PackedReconstruction(
        basis=basis.contiguous(),
        offset=offset,
        order=order.int().contiguous(),
        depth=depth.int(),
        table=table,
        positions=rotary.max_position,
        absorbed=absorbed,
        integers=integers,
    )


def _absorbing_product(code: Code, target: Target) -> float:
    """As `FrequencyBasis.cost` takes it, of keys that are reconstructed in integers."""
    tiles = 1.0 if target.tile_units == 1 else BYTES_ON_TILES
    bytes_at_once = BYTES_IN_BFLOAT16 if target.in_bf16 else BYTES_IN_FLOAT32
    return tiles * bytes_at_once * code.rank / (code.rank + code.eight)


def pack_table(rotary: RotaryTable) -> torch.Tensor:
    """`PackedReconstruction.table`."""
    positions, rotary_dim = rotary.cos_sin.shape
    table = functional.pad(rotary.cos_sin.float(), (0, 0, 0, -positions % TABLE_TOKENS))
    table = table.view(table.shape[0] // TABLE_TOKENS, TABLE_TOKENS, 2, rotary_dim // 2)
    return table.permute(0, 3, 2, 1).contiguous()


def _frequencies(rotary: RotaryTable) -> tuple[float | None, ...]:
    pairs = rotary.rotary_dim // 2
    frequencies = (None,) * pairs if rotary.frequencies is None else rotary.frequencies
    if len(frequencies) != pairs:
        raise KernelError(f"a rotary table of {pairs} pairs has {len(frequencies)} frequencies")
    return frequencies


def _depth(basis: torch.Tensor) -> torch.Tensor:
    """Latents that the pairs up to each one read, of `basis [num_heads, 2 * pairs, rank_k]`."""
    rank = basis.shape[2]
    last = ((basis != 0) * torch.arange(1, rank + 1)).amax(dim=(0, 2))
    return last.view(-1, 2).amax(dim=1).cummax(dim=0).values


def _reconstruction_cost(depth: torch.Tensor, rank: int) -> tuple[float, ...]:
    """As in `find_frequency_basis`; the kernel multiplies pairs to the depth of the last."""
    padded = functional.pad(depth[None].float(), (0, -len(depth) % PAIRS_AT_ONCE), mode="replicate")
    common = padded.view(-1, PAIRS_AT_ONCE).amax(dim=1).repeat_interleave(PAIRS_AT_ONCE)
    return (0.0, *(2 * common[: len(depth)].cumsum(0) / rank).tolist())


def _absorb(frequency_basis: FrequencyBasis, basis: torch.Tensor, in_bf16: bool) -> Absorbed:
    """The slow pairs of `basis [num_heads, 2 * pairs, rank_k]`."""
    bands = frequency_basis.bands
    slow = basis[:, 2 * frequency_basis.direct_pairs :]
    of_bands = slow.split([2 * band.pairs for band in bands], dim=1)
    slow = torch.cat([rows[:, first::2] for rows in of_bands for first in (0, 1)], dim=1)
    slow = functional.pad(slow, (0, -slow.shape[2] % ROW_MULTIPLE))
    if in_bf16:
        slow = slow.unflatten(1, (-1, 2)).transpose(2, 3).bfloat16()
    return Absorbed(
        frequency_basis,
        slow.contiguous(),
        torch.cat([band.coefficients.flatten() for band in bands]),
        torch.tensor([(band.pairs, band.num_functions) for band in bands]),
    )
