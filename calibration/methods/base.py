"""What a calibration method is: the moments it asks for, and the bases it makes of them.

Stands between the streaming pass, which sums `Statistic`s over the calibration text one decoder
layer at a time, and the rank rules, which truncate the `Basis` a method returns. A method is one
class in one file of this folder and one row in the table of `calibration.methods`.

Rows are vectors, as in the paper: a token's key in one head is `k` in R^d, `k' = k E` is cached
and `k_hat = k' D` takes its place. `E = U, D = U^T` is the published, orthogonal case. A latent
head may serve `head_group` neighbouring KV heads, whose keys are then concatenated first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from vllm_eigen.families import Geometry, KeyMode
from vllm_eigen.kernels.planes import staircase

RankRule = Literal["algorithm-1", "global"]
"""How a method likes its ranks chosen: the paper's per-layer thresholds, or one byte budget for
the whole model spent where the measured loss is least."""


@dataclass(frozen=True)
class Batch:
    """What the attention of one decoder layer saw for a few windows of text.

    Queries and keys are those before the rotary embedding, after q/k norms where the family has
    them, i.e. what the low-rank map is applied to in key mode `pre-rope`.

    Attributes:
        query: [batch, length, num_heads, head_size]
        key, value: [batch, length, num_kv_heads, head_size]
        context: the attention output before the output projection,
            [batch, length, num_heads, head_size]
        cos, sin: the rotary embedding's tables, [batch or 1, length, head_size]; None without it.
        weights: attention probabilities, [batch, num_heads, length, length]; None where the
            attention implementation does not give them.
        o_proj: weight of the output projection, [hidden_size, num_heads, head_size].
        derived: what one statistic computed of this batch for others to find, by name.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    context: torch.Tensor
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    o_proj: torch.Tensor | None = None
    derived: dict[str, torch.Tensor] = field(default_factory=dict, init=False)

    def attention(self) -> torch.Tensor:
        """The attention probabilities of a batch that must have them."""
        if self.weights is None:
            raise ValueError("this batch was captured without attention probabilities")
        return self.weights

    def output_weight(self) -> torch.Tensor:
        """The output projection of a batch that must have it."""
        if self.o_proj is None:
            raise ValueError("this batch was captured without the output projection")
        return self.o_proj

    @property
    def tokens(self) -> int:
        """Tokens in the batch."""
        return self.key.shape[0] * self.key.shape[1]


class Statistic(ABC):
    """A float64 sum over tokens; stateless, so that the sums alone are a resumable state.

    Attributes:
        name: of the sum in `Moments`.
        needs_probabilities: whether it reads `Batch.weights`, which costs the slower, eager
            attention.
    """

    name: ClassVar[str]
    needs_probabilities: ClassVar[bool] = False

    @abstractmethod
    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """Shape of the sum."""

    @abstractmethod
    def update(self, total: torch.Tensor, batch: Batch) -> None:
        """Add a batch to `total` (float64, on the batch's device) in place."""


@dataclass(frozen=True)
class Moments:
    """Sums of one layer over the calibration text.

    Attributes:
        tokens: tokens summed over.
        totals: float64 sums on the CPU by the statistic's name; divide by `tokens` for means.
    """

    tokens: int
    totals: Mapping[str, torch.Tensor]

    def mean(self, statistic: type[Statistic]) -> torch.Tensor:
        """The statistic averaged over tokens, float64."""
        return self.totals[statistic.name] / self.tokens


@dataclass(frozen=True)
class Layer:
    """Everything a method may look at in one decoder layer, on the CPU in float64.

    Attributes:
        index: position of the layer, from 0.
        geometry: head counts and sizes.
        moments: the sums that the method asked for.
        o_proj: weight of the output projection, [hidden_size, num_heads, head_size].
        key_mode: where the key is compressed: `folded`, `pre-rope` or `post-rope`.
        head_group: neighbouring KV heads that share a latent head.
        inverse_frequencies: rotary angle per position and plane, [rotary_size / 2]; plane `i`
            pairs elements `i` and `i + rotary_size / 2` of a head. None without it.
    """

    index: int
    geometry: Geometry
    moments: Moments
    o_proj: torch.Tensor
    key_mode: KeyMode
    head_group: int = 1
    inverse_frequencies: torch.Tensor | None = None

    @property
    def num_latent_heads(self) -> int:
        """Heads in the cache."""
        return self.geometry.num_kv_heads // self.head_group

    @property
    def latent_size(self) -> int:
        """Full width of a latent head: `head_group * head_size`."""
        return self.head_group * self.geometry.head_size


@dataclass(frozen=True)
class Basis:
    """Nested low-rank maps of all latent heads of a layer, most important direction first.

    Truncating to rank r keeps the first r columns of the encoder and rows of the decoder.
    At full rank `encoder @ decoder` is the identity.

    Attributes:
        encoder: [num_latent_heads, latent_size, latent_size], `k' = k E[:, :, :r]`
        decoder: [num_latent_heads, latent_size, latent_size], `k_hat = k' D[:, :r, :]`
        energy: squared singular value of each direction, descending, [num_latent_heads,
            latent_size]; the thresholds of Algorithm 1 apply to its square root.
        loss: predicted loss at rank r in any unit comparable between the layers and between K and
            V of this method, [latent_size + 1], non-increasing, `loss[latent_size] = 0`.
        mixed: scalar bool, whether truncated latents are rotated so that all are alike, which
            suits a quantized cache and changes nothing else.
        order: int64, the elements of a latent head from the one that should need the fewest
            latents to the one that may need all, [latent_size]; empty if all may. Truncated latents
            are rotated to that end, which changes nothing else (`vllm_eigen.kernels.planes`).
    """

    encoder: torch.Tensor
    decoder: torch.Tensor
    energy: torch.Tensor
    loss: torch.Tensor
    mixed: torch.Tensor = field(default_factory=lambda: torch.tensor(False))
    order: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def full_rank(self) -> int:
        """Rank at which nothing is lost."""
        return int(self.encoder.shape[-1])

    def at(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder [num_latent_heads, latent_size, rank] and decoder [.., rank, latent_size].

        At full rank both are the identity, its rows in `order`: every basis spans the whole space
        then, and this one adds no rounding.
        """
        if rank == self.full_rank:
            unit = torch.eye(rank, dtype=self.encoder.dtype)
            unit = (unit[self.order] if len(self.order) else unit).expand_as(self.encoder)
            return unit.mT.contiguous(), unit.contiguous()
        encoder, decoder = self.encoder[:, :, :rank], self.decoder[:, :rank, :]
        if len(self.order):
            rotation, decoder = staircase(decoder, self.order)
            return encoder @ rotation, decoder
        if not self.mixed:
            return encoder, decoder
        rotation = hartley(rank).to(encoder)
        return encoder @ rotation, rotation @ decoder

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name, for storage between the stages of a calibration."""
        return {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "energy": self.energy,
            "loss": self.loss,
            "mixed": self.mixed,
            "order": self.order,
        }


@dataclass(frozen=True)
class LayerBases:
    """A method's answer for one layer."""

    key: Basis
    value: Basis


class Method(ABC):
    """A way to choose bases. Instances hold no state; adding one touches one file and one row.

    Attributes:
        name: the value of `--method`.
        summary: one line for `--help` and reports, with its source.
        rank_rule: how its ranks are chosen unless the user says otherwise.
        head_group: how many KV heads share a latent head unless the user says otherwise.
        max_head_group: the most it supports.
        refit: whether its output projections are refitted unless the user says otherwise.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    rank_rule: ClassVar[RankRule] = "global"
    head_group: ClassVar[int] = 1
    max_head_group: ClassVar[int] = 1
    refit: ClassVar[bool] = False

    @abstractmethod
    def statistics(self, key_mode: KeyMode, head_group: int = 1) -> tuple[type[Statistic], ...]:
        """The sums it needs to compress keys in this mode, and values, for such groups."""

    @abstractmethod
    def bases(self, layer: Layer) -> LayerBases:
        """Full-width bases of keys and values, ordered by importance.

        `Layer.moments` may be rank-deficient or zero; the maps must still be finite and, at full
        rank, exact to float32 rounding.
        """


def orthogonal_basis(moment: torch.Tensor) -> Basis:
    """Eigenvectors of second moments as a basis: the SVD of the stacked vectors, squared.

    Args:
        moment: symmetric positive semi-definite, [num_latent_heads, latent_size, latent_size].

    The loss is the energy left out, relative to the whole, summed over heads.
    """
    energy, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    energy = energy.flip(-1).clamp(min=0)
    encoder = vectors.flip(-1)
    return Basis(encoder, encoder.mT.contiguous(), energy, tail_loss(energy))


def hartley(size: int) -> torch.Tensor:
    """The discrete Hartley transform, float64 [size, size]: symmetric, its own inverse.

    Every row takes about equally much of every direction.
    """
    index = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi / max(1, size) * torch.outer(index, index)
    return (angle.cos() + angle.sin()) / math.sqrt(max(1, size))


def tail_loss(energy: torch.Tensor) -> torch.Tensor:
    """Share of the energy lost at each rank: [num_latent_heads, n] to [n + 1], from 1 down to 0."""
    per_rank = energy.sum(0)
    tail = per_rank.flip(0).cumsum(0).flip(0)
    whole = tail[0] if tail[0] > 0 else torch.ones((), dtype=energy.dtype)
    return torch.cat([tail / whole, torch.zeros(1, dtype=energy.dtype)])
