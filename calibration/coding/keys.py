# SPDX-License-Identifier: Apache-2.0
"""Codes of keys: an oblique basis in the Fisher metric, a fixed step for each direction.

With F the mean of g g^T over the gradients of the keys (`gradient_pass`) and C the second moment of
the keys, each weighted with the |g|^2 of its token,

    F^{1/2} C F^{1/2} = W L W^T,    x = (k - o) F^{1/2} W,    k_hat = x_hat W^T F^{-1/2} + o

so that equal errors in all directions cost the same, and a direction's energy L is what it is worth
(reverse water-filling: the bits of a direction grow with log L). Steps are fixed at calibration:
they cost nothing in the cache and nothing at run time, and they are those of least weighted error,
so that the keys of attention sinks, with the largest gradients, are not clipped.

A direction that is worth more than 8 bits (attention to a position, in models with learned ones) is
stored several times, in the place of directions that are worth nothing: with steps that differ the
errors of the copies are independent, and their mean has an n-th of the squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_eigen.calibration.coding.choice import Choice
from vllm_eigen.calibration.coding.loss import loss_by_direction
from vllm_eigen.calibration.methods.basis import Maps, metric_roots, symmetric, weighted_moments
from vllm_eigen.checkpoint.codes import UNIT_BITS, WIDTHS, Code

STEPS = torch.logspace(-1.5, 0, 14, dtype=torch.float64)
"""Steps that are tried, relative to the one that clips nothing."""
COPIES = (1, 4, 8)
"""Times that the most important direction is stored; in 8 bits, which are read four at once."""
COPY_STEPS = 1.25
"""What the steps of copies go up to, relative to the first one's."""
STEP_WINDOWS = 8
"""Windows on which steps are tried."""
_PRICES = torch.logspace(-12, 1, 90, dtype=torch.float64)


@dataclass(frozen=True)
class KeyCodes:
    """What codes of one layer's keys are made of.

    Attributes:
        encoder, decoder: float64 [num_kv_heads, head_size, head_size], most important first.
        offset: o, float64 [num_kv_heads, head_size].
        steps: of the widths 8, 4 and 2, float64 [3, num_kv_heads, head_size].
        losses: foretold loss of each direction, heads added, at 8, 4, 2 and 0 bits,
            float64 [4, head_size].
    """

    encoder: torch.Tensor
    decoder: torch.Tensor
    offset: torch.Tensor
    steps: torch.Tensor
    losses: torch.Tensor

    def choices(self) -> list[Choice]:
        """Codes worth choosing from: each larger than the one before, and loses less."""
        size = self.losses.shape[1]
        least = (Code(eight=4), Code(four=8), Code(two=16))
        codes = dict.fromkeys(code for code in least if code.rank <= size)
        bits = torch.tensor([*WIDTHS, 0], dtype=torch.float64)
        for losses in map(self._losses, self._copies()):
            for price in _PRICES:
                widths = bits[(losses + price * bits[:, None]).argmin(0)]
                counts = []
                left = size
                for width in WIDTHS:
                    unit = UNIT_BITS // width
                    wanted = -(-int((widths == width).sum()) // unit) * unit
                    counts.append(min(wanted, left // unit * unit))
                    left -= counts[-1]
                if sum(counts):
                    codes[Code(eight=counts[0], four=counts[1], two=counts[2])] = None
        found = [Choice(code, self.loss(code)) for code in codes]
        choices: list[Choice] = []
        for item in sorted(found, key=lambda item: (item.code.num_bytes, item.loss)):
            if not choices or item.loss < choices[-1].loss:
                choices.append(item)
        return choices

    def loss(self, code: Code) -> float:
        """Foretold loss of a code."""
        return _total(self._losses(self.copies(code)), code)

    def copies(self, code: Code) -> int:
        """How often a code stores the first direction."""
        return min(self._copies(), key=lambda copies: _total(self._losses(copies), code))

    def _copies(self) -> list[int]:
        """How often the first direction may be stored."""
        return [copies for copies in COPIES if 2 * copies <= self.losses.shape[1]]

    def _columns(self, copies: int) -> torch.Tensor:
        """The direction of each latent, [head_size]."""
        others = torch.arange(1, self.losses.shape[1] - copies + 1)
        return torch.cat([torch.zeros(copies, dtype=torch.int64), others])

    def _losses(self, copies: int) -> torch.Tensor:
        """As `losses`, of latents instead of directions."""
        found = self.losses[:, self._columns(copies)].clone()
        if copies > 1:
            # Narrower ones gain nothing for certain: few levels, so that errors are alike.
            found[:, :copies] /= copies
            found[0, :copies] *= float(_copy_steps(copies).square().mean()) / copies
            # What is stored no longer is lost whatever the code.
            found[:, -1] += self.losses[-1, 1 - copies :].sum()
        return found

    def maps(self, code: Code) -> tuple[Maps, torch.Tensor]:
        """Encoder and decoder with steps multiplied in, and the offset to go with them.

        The offset contains half a step of every direction: with it the levels are -2^(b-1), .., 0,
        .., 2^(b-1) - 1 steps, so that what is near the offset is stored as the offset.
        """
        copies = self.copies(code)
        columns = self._columns(copies)[: code.rank]
        steps = self.steps[_rows(code), :, columns].T.clone()
        decoder = self.decoder[:, columns].clone()
        steps[:, :copies] *= _copy_steps(copies)
        decoder[:, :copies] /= copies
        encoder = self.encoder[:, :, columns] / steps[:, None]
        decoder *= steps[:, :, None]
        return (encoder, decoder), self.offset - decoder.sum(1) / 2


def fit_keys(key: torch.Tensor, gradient: torch.Tensor) -> KeyCodes:
    """Codes for the keys of a layer, with the offset that is foretold to lose less.

    Args:
        key, gradient: float32 [num_windows, length, num_kv_heads, head_size].
    """
    weights = gradient.double().square().sum(-1)
    mean = torch.einsum("wth,wthd->hd", weights, key.double())
    mean /= weights.sum((0, 1)).clamp(min=1e-300)[:, None]
    fits = [_fit(key, gradient, offset) for offset in (torch.zeros_like(mean), mean)]
    return min(fits, key=lambda fit: float(fit.losses[1].sum()))


def _fit(key: torch.Tensor, gradient: torch.Tensor, offset: torch.Tensor) -> KeyCodes:
    parts = [
        _fit_head(key[:, :, head].double() - offset[head], gradient[:, :, head].double())
        for head in range(key.shape[2])
    ]
    encoder, decoder, steps, losses = (torch.stack(item) for item in zip(*parts, strict=True))
    return KeyCodes(encoder, decoder, offset, steps.transpose(0, 1), losses.sum(0))


def _fit_head(x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Encoder, decoder, steps [3, size] and losses [4, size] of a head [windows, length, size]."""
    rows, slopes = x.flatten(0, 1), gradient.flatten(0, 1)
    weights = slopes.square().sum(-1)
    moment, metric = weighted_moments(rows, slopes)
    root, inverse = metric_roots(metric)
    _, vectors = torch.linalg.eigh(symmetric(root @ moment @ root))
    vectors = vectors.flip(-1)
    encoder, decoder = root @ vectors, vectors.T @ inverse
    latents, slopes = (x @ encoder).float(), (gradient @ decoder.T).float()
    steps, losses = [], []
    windows = slice(0, STEP_WINDOWS)
    some, weight = latents[windows].flatten(0, 1), weights.view(x.shape[:2])[windows].flatten()
    for width in WIDTHS:
        step = best_steps(some, weight.float(), width)
        steps.append(step.double())
        losses.append(loss_by_direction(_rounded(latents, step, width) - latents, slopes))
    losses.append(loss_by_direction(latents, slopes))
    return encoder, decoder, torch.stack(steps), torch.stack(losses)


def best_steps(x: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    """The step of each direction with the least weighted squared error, [size].

    Args:
        x: [num_tokens, size].
        weights: [num_tokens].
    """
    widest: torch.Tensor = (x.abs().amax(0) / (2 ** (width - 1) - 1)).clamp(min=1e-20)
    best, chosen = torch.full_like(widest, torch.inf), widest.clone()
    for share in STEPS.tolist():
        step = widest * share
        error = weights @ (_rounded(x, step, width) - x).square()
        better = error < best
        best[better], chosen[better] = error[better], step[better]
    return chosen


def _rounded(x: torch.Tensor, step: torch.Tensor, width: int) -> torch.Tensor:
    half = 2 ** (width - 1)
    rounded: torch.Tensor = (x / step).round().clamp(-half, half - 1) * step
    return rounded


def _copy_steps(copies: int) -> torch.Tensor:
    """Steps of copies relative to the first one's, float64 [copies]."""
    return COPY_STEPS ** (torch.arange(copies, dtype=torch.float64) / copies)


def _total(losses: torch.Tensor, code: Code) -> float:
    """Foretold loss of a code whose latents lose `losses` [4, size] each."""
    kept = losses[_rows(code), torch.arange(code.rank)].sum()
    return float(kept + losses[-1, code.rank :].sum())


def _rows(code: Code) -> torch.Tensor:
    """The row of `KeyCodes.steps` of each direction."""
    return torch.tensor([WIDTHS.index(width) for width in code.widths])
