# SPDX-License-Identifier: Apache-2.0
"""The sizes that kernels are compiled for: few for all layers of a model.

Ranks are arguments of a kernel, the padded widths of its tiles are constants. Were every layer
padded for itself, a model of many ranks would compile a kernel for each, so its layers share
NUM_PADDINGS of them: one that all fit, and the one that saves most.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import product
from math import gcd

from triton import next_power_of_2

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels.gpu.tiles import MIN_DOT, rank_chunks
from vllm_eigen.kernels.interface import Latents, LayerSpec

NUM_PADDINGS = 2
LOAD_BYTES = 16
MAX_FOLDS = 4
"""Times that units of 2-bit codes are in a tile; see `coded.layout.CodeTile`."""
MIN_VALUE_UNITS = 32
"""Units of a tile of value codes. With fewer, the four warps of a product have no columns of their
own, and each holds all of them in registers."""


@dataclass(frozen=True, order=True)
class Padding:
    """Padded widths of a key and a value.

    key, value: numbers, or of codes, units of 8 and 4 bits.
    key_two, value_two: units of 2-bit codes.
    """

    key: int
    value: int
    key_two: int = 0
    value_two: int = 0

    @property
    def numbers(self) -> int:
        """Roughly the numbers of a token that are multiplied."""
        return self.key + self.value + 2 * (self.key_two + self.value_two)

    def covers(self, other: Padding) -> bool:
        """Whether what fits the other fits this."""
        return all(a >= b for a, b in zip(astuple(self), astuple(other), strict=True))


@dataclass(frozen=True)
class CompiledSizes:
    """What one layer's kernels are compiled for.

    padding: of attention. widest: of cache writes, the same for all layers.
    rank: the greatest of all layers. unit: what all ranks are multiples of, as far as it makes
        loads wider.
    planes: numbers that attention reads as one: two of one byte where ranks allow.
    """

    padding: Padding
    widest: Padding
    rank: int
    unit: int
    planes: int


def compiled_sizes(layer: LayerSpec) -> CompiledSizes:
    """The sizes of a layer among its peers."""
    own = layer.latents
    peers = tuple(sorted({*layer.peers, own}, key=repr))
    unit, rank = _unit_and_rank(peers, LOAD_BYTES // layer.cache_dtype.itemsize)
    planes = 2 if layer.is_fp8 and unit % 2 == 0 else 1
    shared = shared_paddings(tuple(padding_of(one, planes) for one in peers))
    padding = min((one for one in shared if one.covers(padding_of(own, planes))), key=_cost)
    return CompiledSizes(padding, max(shared, key=_cost), rank, unit, planes)


def padding_of(latents: Latents, planes: int = 1) -> Padding:
    """The least padding of one layer; of numbers, `planes` of which are read as one."""
    key, value = latents.key_code, latents.value_code
    if key is None or value is None:
        ranks = latents.rank_k, latents.rank_v
        return Padding(*(planes * sum(rank_chunks(-(-rank // planes))) for rank in ranks))
    (key_wide, key_two), (value_wide, value_two) = (
        _padded_units(code, least) for code, least in ((key, MIN_DOT), (value, MIN_VALUE_UNITS))
    )
    return Padding(key_wide, value_wide, key_two, value_two)


@lru_cache
def shared_paddings(paddings: tuple[Padding, ...]) -> tuple[Padding, ...]:
    """At most NUM_PADDINGS of which one covers each of `paddings`, with the fewest numbers."""
    columns = list(zip(*map(astuple, paddings), strict=True))
    widest = Padding(*map(max, columns))
    candidates = [Padding(*sizes) for sizes in product(*map(set, columns))]

    def saved(one: Padding) -> int:
        return (widest.numbers - one.numbers) * sum(map(one.covers, paddings))

    best = max(sorted(candidates), key=saved)
    return tuple(dict.fromkeys((best, widest)))


def _unit_and_rank(peers: tuple[Latents, ...], unit: int) -> tuple[int, int]:
    """Unit and greatest rank of a model's layers."""
    ranks = [rank for one in peers for rank in (one.rank_k, one.rank_v)]
    return gcd(unit, *ranks), max(ranks)


def _padded_units(code: Code, least: int) -> tuple[int, int]:
    """Units of 8 and 4 bits, and of 2 bits, both padded, in tiles of at least so many."""
    wide, two = code.eight // 2 + code.four // 4, code.two // 8
    wide = -(-wide // least) * least
    # Fewer units are folded, up to MAX_FOLDS times.
    padded_two = max(least // MAX_FOLDS, next_power_of_2(two)) if two else 0
    return sum(rank_chunks(wide)) if wide else 0, padded_two


def _cost(padding: Padding) -> int:
    return padding.numbers
