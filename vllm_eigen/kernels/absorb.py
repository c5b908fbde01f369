"""Slowly turning planes of rotary keys absorbed into the query: decode rebuilds only the others.

A plane is two dimensions of a head that rotate together, by `speed` radians a token. Over a chunk
of CHUNK tokens the cosines and sines of slow planes are smooth, and a few functions of the token,
called waves here, span all of them:

    cos(speed_j * t) = sum over m of waves[m, t] * blend[m, 0, j]     t = 0 .. CHUNK - 1
    sin(speed_j * t) = sum over m of waves[m, t] * blend[m, 1, j]

What the slow planes add to the score of a query against the latent c of token t is therefore
`sum over m of waves[m, t] * (u_m . c)`, where u_m is the query, turned back to the chunk's start,
blended for wave m and multiplied by the basis: a folded query for each wave and chunk. Many
queries share a rebuilt key but not a folded query: for them rebuilding more planes is cheaper, and
planes that read few latents (`planes.py`) are cheap to rebuild. `find_waves` weighs it all.

The functions {cos, sin} of frequencies up to B have about CHUNK * B / pi degrees of freedom
(Slepian and Pollak 1961); the singular value decomposition finds them. Slower planes need fewer:
the waves are found band by band from the slowest on, and a band uses the first few. `absorb.h` is
the other half.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

CHUNK = 256  # kChunk in chunk.h
BANDS = 4
DIRECT_STEP = 3  # planes that rebuild.h multiplies at once
# Absorbing must save this much, since it has more steps than rebuilding.
LARGEST_SHARE = 0.85
# Folding a chunk's queries, relative to other products: the last chunk is half full on average,
# and small matrices run slower.
FOLDING_WEIGHT = 1.5

_turning_speeds = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Band:
    """Planes that use the first waves. blend: float32 `[num_waves of the band, 2, planes]`."""

    blend: torch.Tensor

    @property
    def num_waves(self) -> int:
        """How many of the first waves it uses."""
        return self.blend.shape[0]

    @property
    def planes(self) -> int:
        """How many planes it has."""
        return self.blend.shape[2]


@dataclass(frozen=True, eq=False)
class Waves:
    """Planes from `direct_planes` on are absorbed, those before it rebuilt.

    waves: float32 `[num_waves, CHUNK]`. bands: in the order of planes.
    """

    direct_planes: int
    waves: torch.Tensor
    bands: tuple[Band, ...]

    @property
    def cost(self) -> float:
        """Multiplications of a query with a cached token's latent, in units of rank_k."""
        folding = sum(2 * band.planes * band.num_waves for band in self.bands) / CHUNK
        return self.waves.shape[0] + FOLDING_WEIGHT * folding


def tolerance(dtype: torch.dtype) -> float:
    """Largest error of a cosine or sine: an eighth of what rounding a query of `dtype` may cost."""
    return max(torch.finfo(dtype).eps / 16, 1e-6)


@functools.lru_cache(maxsize=64)
def find_waves(
    speeds: tuple[float | None, ...],
    rebuilding: tuple[float, ...],
    queries_per_head: int,
    largest_error: float,
) -> Waves | None:
    """The cheapest split of a head's planes into rebuilt and absorbed ones.

    Args:
        speeds: radians a token of each plane, 0 where it does not turn, None where it turns
            unevenly and must be rebuilt.
        rebuilding: multiplications that rebuild the first n planes of a token, in units of rank_k,
            for n from 0 to all.
        queries_per_head: query rows that share a rebuilt key.
        largest_error: of any cosine or sine.

    Returns:
        None if rebuilding every plane costs no more than 1 / LARGEST_SHARE of it.
    """
    planes = len(speeds)
    uneven = [plane for plane, speed in enumerate(speeds) if speed is None]
    cheapest, found = LARGEST_SHARE * (rebuilding[-1] + queries_per_head), None
    first = -(-(max(uneven, default=-1) + 1) // DIRECT_STEP) * DIRECT_STEP
    for direct in range(first, planes, DIRECT_STEP):
        if rebuilding[direct] >= cheapest:
            break
        absorbed = [speed for speed in speeds[direct:] if speed is not None]
        slow = torch.tensor(absorbed, dtype=torch.float64)
        most = int((cheapest - rebuilding[direct]) / queries_per_head)
        waves = _span(direct, slow, most, largest_error)
        if waves is None:
            continue
        cost = rebuilding[direct] + queries_per_head * waves.cost
        if cost < cheapest:
            cheapest, found = cost, waves
    return found


def _span(direct: int, slow: torch.Tensor, most: int, largest_error: float) -> Waves | None:
    """The fewest functions that span cosines and sines of `slow`, None if more than `most`."""
    token = torch.arange(CHUNK, dtype=torch.float64)[:, None]
    waves = torch.zeros(CHUNK, 0, dtype=torch.float64)
    bands: list[Band] = []
    for part in reversed(slow.chunk(BANDS)):
        wanted = torch.cat([(token * part).cos(), (token * part).sin()], dim=1)
        missing = _outside(waves, wanted)
        new, sizes, shares = torch.linalg.svd(missing, full_matrices=False)
        count = 0
        while float(missing.abs().max()) > largest_error:
            missing = missing - sizes[count] * torch.outer(new[:, count], shares[count])
            count += 1
            if waves.shape[1] + count > min(most, CHUNK):
                return None
        waves = torch.cat([waves, _outside(waves, new[:, :count])], dim=1)
        # Waves of size about one, so that blends fall with the singular values.
        blend = (waves.t() @ wanted) / CHUNK**0.5
        bands.insert(0, Band(blend.float().view(waves.shape[1], 2, -1).contiguous()))
    return Waves(direct, (waves.t() * CHUNK**0.5).float().contiguous(), tuple(bands))


def _outside(waves: torch.Tensor, functions: torch.Tensor) -> torch.Tensor:
    """Functions without what orthonormal waves span of them, columns all.

    Twice: what is left may be small, and then the first time leaves rounding along the waves that
    the next band would magnify.
    """
    for _ in range(2):
        functions = functions - waves @ (waves.t() @ functions)
    return functions


def turning_speeds(cos_sin: torch.Tensor) -> tuple[float | None, ...]:
    """Radians a token of each plane of a rotary table `[positions, rotary_dim]`.

    None for a plane whose rows are not one even rotation within each chunk, up to the rounding of
    a float32 angle: interleaved sections, tables of several regimes or of few digits.
    """
    if cos_sin not in _turning_speeds:
        _turning_speeds[cos_sin] = _measure_speeds(cos_sin)
    found: tuple[float | None, ...] = _turning_speeds[cos_sin]
    return found


def _measure_speeds(cos_sin: torch.Tensor) -> tuple[float | None, ...]:
    positions, planes = cos_sin.shape[0], cos_sin.shape[1] // 2
    if positions < 2:
        return (None,) * planes
    cosines, sines = cos_sin.double().cpu().chunk(2, dim=1)
    first = torch.complex(cosines[:2], sines[:2])
    speeds = torch.angle(first[1] * first[0].conj())
    lengths = first[0].abs()
    turns = torch.exp(1j * torch.arange(CHUNK)[:, None] * speeds)
    even = torch.ones(planes, dtype=torch.bool)
    for start in range(0, positions, CHUNK):
        rows = slice(start, min(start + CHUNK, positions))
        turned = torch.complex(cosines[rows], sines[rows])
        strayed = (turned - turned[:1] * turns[: turned.shape[0]]).abs()
        rounding = 4e-6 + rows.stop * speeds.abs() * 2.0**-22
        even &= (strayed <= lengths * rounding).all(dim=0)
    return tuple(
        speed if is_even else None
        for speed, is_even in zip(speeds.tolist(), even.tolist(), strict=True)
    )
