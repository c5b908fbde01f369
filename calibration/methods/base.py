# SPDX-License-Identifier: Apache-2.0
"""What a calibration method is: the statistics it asks for, and the bases it makes of them.

A method is one class in one file of this folder and one row in the table of
`vllm_eigen.calibration.methods`. The pass over the layers sums its `Statistic`s over the
calibration text; the rank rules truncate the `Basis` it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from vllm_eigen.calibration.methods.basis import LayerBases
from vllm_eigen.calibration.statistics.samples import CachedSamples
from vllm_eigen.calibration.statistics.statistic import Moments, Statistic
from vllm_eigen.checkpoint.families import Geometry
from vllm_eigen.checkpoint.modes import KeyMode


class RankRule(StrEnum):
    """How ranks are chosen for a KV ratio.

    ALGORITHM_1: the paper's threshold on each layer's spectrum, one error budget for all layers.
    GLOBAL: one byte budget for the whole model, allocated where the measured loss is least.
    FORETOLD: the same with the loss that the bases foretell, without a measurement.
    """

    ALGORITHM_1 = "algorithm-1"
    GLOBAL = "global"
    FORETOLD = "foretold"

    @property
    def uses_layer_errors(self) -> bool:
        """Whether it reads each layer's output error against the threshold."""
        return self is RankRule.ALGORITHM_1

    @property
    def measures_losses(self) -> bool:
        """Whether it tries some ranks of every layer (`allocation.probe`)."""
        return self is RankRule.GLOBAL


@dataclass(frozen=True)
class Layer:
    """What a method makes the bases of one decoder layer from.

    Attributes:
        index: position of the layer, from 0.
        geometry: head counts and sizes.
        moments: the sums that the method asked for.
        key_mode: where the key is compressed relative to the rotary embedding.
        head_group: neighbouring KV heads that share a latent head.
    """

    index: int
    geometry: Geometry
    moments: Moments
    key_mode: KeyMode
    head_group: int = 1

    @property
    def num_latent_heads(self) -> int:
        """Heads in the cache."""
        return self.geometry.num_kv_heads // self.head_group

    @property
    def latent_size(self) -> int:
        """Full width of a latent head: `head_group * head_size`."""
        return self.head_group * self.geometry.head_size


class Method(ABC):
    """A way to compress. Instances hold no state; adding one touches one file and one row.

    Attributes:
        name: the value of `--method`.
        summary: one line for `--help` and reports, with its source.
        head_group: how many KV heads share a latent head unless the user says otherwise.
        max_head_group: the most it supports.
        refit: whether its output projections are refitted unless the user says otherwise.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    head_group: ClassVar[int] = 1
    max_head_group: ClassVar[int] = 1
    refit: ClassVar[bool] = False


class RankMethod(Method):
    """A way to choose bases whose latents are kept in 16 bits or fp8, the last ones dropped.

    Attributes:
        rank_rule: how its ranks are chosen unless the user says otherwise.
    """

    rank_rule: ClassVar[RankRule] = RankRule.GLOBAL


class StatisticsMethod(RankMethod):
    """A method whose bases are made of sums over the calibration text."""

    @abstractmethod
    def statistics(self, key_mode: KeyMode, head_group: int = 1) -> tuple[Statistic, ...]:
        """The sums it needs to compress keys in this mode, and values, for such groups."""

    @abstractmethod
    def bases(self, layer: Layer) -> LayerBases:
        """Full-width bases of keys and values, ordered by importance.

        `Layer.moments` may be rank-deficient or zero; the maps must still be finite and, at full
        rank, exact to float32 rounding.
        """


class GradientMethod(RankMethod):
    """A method whose bases are made of what layers cache and the loss's gradients in it."""

    @abstractmethod
    def bases(self, samples: CachedSamples) -> LayerBases:
        """Full-width bases of keys and values, ordered by importance.

        Their losses are foretold ones, comparable over layers, keys and values.
        """
