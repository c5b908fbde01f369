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

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels.gpu.tiles import MIN_DOT, padded, rank_chunks
from vllm_eigen.kernels.interface import Latents, LayerSpec

NUM_PADDINGS = 2
LOAD_BYTES = 16
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
    """

    padding: Padding
    widest: Padding
    rank: int
    unit: int


def compiled_sizes(layer: LayerSpec) -> CompiledSizes:
    """The sizes of a layer among its peers."""
    own = layer.latents
    peers = tuple(sorted({*layer.peers, own}, key=repr))
    unit, rank, shared = _shared_sizes(peers, LOAD_BYTES // layer.cache_dtype.itemsize)
    padding = min((one for one in shared if one.covers(padding_of(own))), key=_cost)
    return CompiledSizes(padding, max(shared, key=_cost), rank, unit)


def padding_of(latents: Latents) -> Padding:
    """The least padding of one layer."""
    key, value = latents.key_code, latents.value_code
    if key is None or value is None:
        return Padding(*(sum(rank_chunks(rank)) for rank in (latents.rank_k, latents.rank_v)))
    (key_wide, key_two), (value_wide, value_two) = (
        _padded_units(code, least) for code, least in ((key, MIN_DOT), (value, MIN_VALUE_UNITS))
    )
    return Padding(key_wide, value_wide, key_two, value_two)


def shared_paddings(paddings: tuple[Padding, ...]) -> tuple[Padding, ...]:
    """At most NUM_PADDINGS of which one covers each of `paddings`, with the fewest numbers."""
    columns = list(zip(*map(astuple, paddings), strict=True))
    widest = Padding(*map(max, columns))
    candidates = [Padding(*sizes) for sizes in product(*map(set, columns))]

    def saved(one: Padding) -> int:
        return (widest.numbers - one.numbers) * sum(map(one.covers, paddings))

    best = max(sorted(candidates), key=saved)
    return tuple(dict.fromkeys((best, widest)))


@lru_cache
def _shared_sizes(peers: tuple[Latents, ...], unit: int) -> tuple[int, int, tuple[Padding, ...]]:
    """Unit, greatest rank and paddings of a model's layers."""
    ranks = [rank for one in peers for rank in (one.rank_k, one.rank_v)]
    return gcd(unit, *ranks), max(ranks), shared_paddings(tuple(map(padding_of, peers)))


def _padded_units(code: Code, least: int) -> tuple[int, int]:
    """Units of 8 and 4 bits, and of 2 bits, both padded, in tiles of at least so many."""
    wide, two = code.eight // 2 + code.four // 4, code.two // 8
    wide = -(-wide // least) * least
    return sum(rank_chunks(wide)) if wide else 0, padded(max(two, least)) if two else 0


def _cost(padding: Padding) -> int:
    return padding.numbers
