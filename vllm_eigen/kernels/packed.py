"""`Rebuild` as the C++ kernels read it: planes side by side, units of 32 bits, tables by token.

Packing costs a few copies, so a result is kept as long as its `Rebuild` lives, and the table of
cosines as long as the tensor it came from: layers share one.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from .absorb import DIRECT_STEP, Waves, find_waves, tolerance, turning_speeds
from .interface import Rebuild
from .planes import plane_order

TABLE_TOKENS = 16  # kTableTokens in rebuild.h

ROW_MULTIPLE = 16  # of the numbers in a row of Absorbed.basis

_tables = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Absorbed:
    """Tensors that AbsorbArgs (args.h) points into.

    basis: float32 `[num_heads, 2 * slow planes, rank_k rounded up]`, of each band x, then y.
    blend: float32, of all bands one after the other.
    bands: int64 `[num_bands, 2]`, planes and waves of each.
    """

    waves: Waves
    basis: torch.Tensor
    blend: torch.Tensor
    bands: torch.Tensor


@dataclass(frozen=True, eq=False)
class PackedRebuild:
    """Tensors that RebuildArgs (args.h) points into.

    basis: `[num_heads, 2 * planes, units]`, bfloat16 pairs or float32; rows follow `order`.
    offset: float32 `[num_heads, 2 * planes]`, or None.
    order: int32 `[2 * planes]`, the head dimension of each row, -1 where a plane is padded.
    depth: int32 `[planes]`, the units of a row after which all are zero, up to this plane.
    table: float32 `[positions / 16, rotary_planes, 2, 16]`, cosines then sines of 16 positions.
    absorbed: how a single query does without rebuilding its slow planes; None if it cannot.
    """

    basis: torch.Tensor
    offset: torch.Tensor | None
    order: torch.Tensor
    depth: torch.Tensor
    table: torch.Tensor
    rotary_planes: int
    positions: int
    absorbed: Absorbed | None


@dataclass(frozen=True)
class Reader:
    """What a packed `Rebuild` depends on besides itself.

    pairs: the cache is read in bfloat16 pairs, otherwise in floats.
    dtype: of the queries. queries_per_head: query heads that share a rebuilt one.
    """

    pairs: bool
    dtype: torch.dtype
    queries_per_head: int


_packed: weakref.WeakKeyDictionary[Rebuild, dict[Reader, PackedRebuild]] = (
    weakref.WeakKeyDictionary()
)


def pack(rebuild: Rebuild, reader: Reader) -> PackedRebuild:
    """`rebuild` in kernel order, made once."""
    by_reader = _packed.setdefault(rebuild, {})
    if reader not in by_reader:
        by_reader[reader] = _pack(rebuild, reader)
    return by_reader[reader]


def _pack(rebuild: Rebuild, reader: Reader) -> PackedRebuild:
    head_size = rebuild.key_basis.shape[2]
    order = plane_order(head_size, rebuild.rotary_dim, rebuild.is_neox_style)
    chosen, present = order.clamp_min(0), (order >= 0)
    basis = rebuild.key_basis.float().transpose(1, 2)[:, chosen] * present[:, None]
    offset = rebuild.key_offset
    if offset is not None:
        offset = (offset.float()[:, chosen] * present).contiguous()
    speeds = turning_speeds(rebuild.cos_sin)
    still = (0.0,) * (order.shape[0] // 2 - len(speeds))
    depth = _depth(basis)
    waves = find_waves(
        speeds + still,
        _rebuilding(depth, basis.shape[2]),
        reader.queries_per_head,
        tolerance(reader.dtype),
    )
    absorbed = None if waves is None else _absorb(waves, basis)
    if reader.pairs:
        basis = functional.pad(basis, (0, basis.shape[2] % 2)).bfloat16()
        depth = (depth + 1) // 2
    return PackedRebuild(
        basis=basis.contiguous(),
        offset=offset,
        order=order.int().contiguous(),
        depth=depth.int(),
        table=_table(rebuild.cos_sin),
        rotary_planes=rebuild.rotary_dim // 2,
        positions=rebuild.cos_sin.shape[0],
        absorbed=absorbed,
    )


def _depth(basis: torch.Tensor) -> torch.Tensor:
    """Latents that the planes up to each one read, of `basis [num_heads, 2 * planes, rank_k]`."""
    rank = basis.shape[2]
    last = ((basis != 0) * torch.arange(1, rank + 1)).amax(dim=(0, 2))
    return last.view(-1, 2).amax(dim=1).cummax(dim=0).values


def _rebuilding(depth: torch.Tensor, rank: int) -> tuple[float, ...]:
    """As in `find_waves`: the kernel multiplies DIRECT_STEP planes to their common depth."""
    padded = functional.pad(depth[None].float(), (0, -len(depth) % DIRECT_STEP), mode="replicate")
    common = padded.view(-1, DIRECT_STEP).amax(dim=1).repeat_interleave(DIRECT_STEP)[: len(depth)]
    return (0.0, *(2 * common.cumsum(0) / rank).tolist())


def _absorb(waves: Waves, basis: torch.Tensor) -> Absorbed:
    """The slow planes of `basis [num_heads, 2 * planes, rank_k]`."""
    slow = basis[:, 2 * waves.direct_planes :]
    parts = slow.split([2 * band.planes for band in waves.bands], dim=1)
    slow = torch.cat([part[:, first::2] for part in parts for first in (0, 1)], dim=1)
    return Absorbed(
        waves,
        functional.pad(slow, (0, -slow.shape[2] % ROW_MULTIPLE)).contiguous(),
        torch.cat([band.blend.flatten() for band in waves.bands]),
        torch.tensor([(band.planes, band.num_waves) for band in waves.bands]),
    )


def _table(cos_sin: torch.Tensor) -> torch.Tensor:
    if cos_sin not in _tables:
        positions, rotary_dim = cos_sin.shape
        table = functional.pad(cos_sin.float(), (0, 0, 0, -positions % TABLE_TOKENS))
        table = table.view(table.shape[0] // TABLE_TOKENS, TABLE_TOKENS, 2, rotary_dim // 2)
        _tables[cos_sin] = table.permute(0, 3, 2, 1).contiguous()
    found: torch.Tensor = _tables[cos_sin]
    return found
