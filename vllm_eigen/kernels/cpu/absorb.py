# SPDX-License-Identifier: Apache-2.0
"""Slow RoPE pairs of keys absorbed into the query, so that decode reconstructs only the others.

A RoPE pair is two dimensions of a head that rotate together, by `frequency` radians a token. Over
a chunk of KV_CHUNK tokens the cosines and sines of slow pairs are smooth, and a few functions of
the token, a frequency basis, span all of them:

    cos(frequency_j * t) = sum over m of functions[m, t] * coefficients[m, 0, j]
    sin(frequency_j * t) = sum over m of functions[m, t] * coefficients[m, 1, j]

for t = 0 .. KV_CHUNK - 1. What the slow pairs add to the score of a query against the latent c of
token t is therefore `sum over m of functions[m, t] * (u_m . c)`, where u_m is the query, rotated
back to the chunk's start, weighted by the coefficients of m and multiplied by the key basis: an
absorbed query for each basis function and chunk. Many queries share a reconstructed key but not an
absorbed query: for them reconstructing more pairs is cheaper, and pairs that read few latents
(triangular order, `rope.py`) are cheap to reconstruct. `find_frequency_basis` weighs it all.

The functions {cos, sin} of frequencies up to B have about KV_CHUNK * B / pi degrees of freedom
(Slepian and Pollak 1961); the singular value decomposition finds them. Slower pairs need fewer: the
functions are found band by band from the slowest on, and a band uses the first few. `absorb.h` is
the other half.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

KV_CHUNK = 256  # tokens
BANDS = 4
PAIRS_AT_ONCE = 3  # that reconstruct.h multiplies
# Absorbing must save this much, since it has more steps than reconstructing.
LARGEST_SHARE = 0.85
# Absorbing a chunk's queries, relative to other products: the last chunk is half full on average,
# and small matrices run slower.
ABSORBING_WEIGHT = 1.5


@dataclass(frozen=True, eq=False)
class Band:
    """Pairs that use the first functions. coefficients: float32 `[num_functions, 2, pairs]`."""

    coefficients: torch.Tensor

    @property
    def num_functions(self) -> int:
        """How many of the first functions it uses."""
        return self.coefficients.shape[0]

    @property
    def pairs(self) -> int:
        """How many pairs it has."""
        return self.coefficients.shape[2]


@dataclass(frozen=True, eq=False)
class FrequencyBasis:
    """Pairs from `direct_pairs` on are absorbed, those before it reconstructed.

    functions: float32 `[num_functions, KV_CHUNK]`. bands: in the order of pairs.
    """

    direct_pairs: int
    functions: torch.Tensor
    bands: tuple[Band, ...]

    def cost(self, absorbing_product: float) -> float:
        """Products of a query with a cached token's latent, in units of rank_k.

        Args:
            absorbing_product: time of a product while queries are absorbed, relative to others.
        """
        absorbing = sum(2 * band.pairs * band.num_functions for band in self.bands) / KV_CHUNK
        return self.functions.shape[0] + ABSORBING_WEIGHT * absorbing_product * absorbing


def tolerance(dtype: torch.dtype) -> float:
    """Largest error of a cosine or sine: an eighth of what rounding a query of `dtype` may cost."""
    return max(torch.finfo(dtype).eps / 16, 1e-6)


@functools.lru_cache(maxsize=64)
def find_frequency_basis(
    frequencies: tuple[float | None, ...],
    cost_of_pairs: tuple[float, ...],
    queries_per_head: int,
    largest_error: float,
    absorbing_product: float = 1.0,
) -> FrequencyBasis | None:
    """The cheapest split of a head's pairs into reconstructed and absorbed ones.

    Args:
        frequencies: radians a token of each pair, 0 where it does not rotate, None where it is no
            even rotation and must be reconstructed.
        cost_of_pairs: multiplications that reconstruct the first n pairs of a token, in units of
            rank_k, for n from 0 to all.
        queries_per_head: query rows that share a reconstructed key.
        largest_error: of any cosine or sine.
        absorbing_product: see `FrequencyBasis.cost`.

    Returns:
        None if reconstructing every pair costs no more than 1 / LARGEST_SHARE of it.
    """
    pairs = len(frequencies)
    uneven = [pair for pair, frequency in enumerate(frequencies) if frequency is None]
    cheapest, found = LARGEST_SHARE * (cost_of_pairs[-1] + queries_per_head), None
    first = -(-(max(uneven, default=-1) + 1) // PAIRS_AT_ONCE) * PAIRS_AT_ONCE
    for direct in range(first, pairs, PAIRS_AT_ONCE):
        if cost_of_pairs[direct] >= cheapest:
            break
        absorbed = [frequency for frequency in frequencies[direct:] if frequency is not None]
        slow = torch.tensor(absorbed, dtype=torch.float64)
        most = int((cheapest - cost_of_pairs[direct]) / queries_per_head)
        basis = _span(direct, slow, most, largest_error)
        if basis is None:
            continue
        cost = cost_of_pairs[direct] + queries_per_head * basis.cost(absorbing_product)
        if cost < cheapest:
            cheapest, found = cost, basis
    return found


def _span(
    direct: int, slow: torch.Tensor, most: int, largest_error: float
) -> FrequencyBasis | None:
    """The fewest functions that span cosines and sines of `slow`, None if more than `most`."""
    token = torch.arange(KV_CHUNK, dtype=torch.float64)[:, None]
    basis = torch.zeros(KV_CHUNK, 0, dtype=torch.float64)
    bands: list[Band] = []
    for frequencies in reversed(slow.chunk(BANDS)):
        wanted = torch.cat([(token * frequencies).cos(), (token * frequencies).sin()], dim=1)
        missing = _outside(basis, wanted)
        new, sizes, shares = torch.linalg.svd(missing, full_matrices=False)
        count = 0
        while float(missing.abs().max()) > largest_error:
            missing = missing - sizes[count] * torch.outer(new[:, count], shares[count])
            count += 1
            if basis.shape[1] + count > min(most, KV_CHUNK):
                return None
        basis = torch.cat([basis, _outside(basis, new[:, :count])], dim=1)
        # Functions of size about one, so that coefficients fall with the singular values.
        coefficients = (basis.t() @ wanted) / KV_CHUNK**0.5
        bands.insert(0, Band(coefficients.float().view(basis.shape[1], 2, -1).contiguous()))
    return FrequencyBasis(direct, (basis.t() * KV_CHUNK**0.5).float().contiguous(), tuple(bands))


def _outside(basis: torch.Tensor, functions: torch.Tensor) -> torch.Tensor:
    """Functions without what the orthonormal `basis` spans of them, columns all.

    Twice: what is left may be small, and then the first time leaves rounding along the basis that
    the next band would magnify.
    """
    for _ in range(2):
        functions = functions - basis @ (basis.t() @ functions)
    return functions
