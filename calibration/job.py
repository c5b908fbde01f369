# SPDX-License-Identifier: Apache-2.0
"""A calibration with everything decided: what its stages are given instead of single settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_eigen.calibration.coding.budget import bytes_for
from vllm_eigen.calibration.coding.values import codes_of
from vllm_eigen.calibration.methods import get_method
from vllm_eigen.calibration.methods.base import (
    Method,
    RankMethod,
    RankRule,
    StatisticsMethod,
)
from vllm_eigen.calibration.model.activations import MEMORY_LIMIT, ActivationStream
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.source import Source
from vllm_eigen.calibration.options import Options
from vllm_eigen.calibration.preference import Preference
from vllm_eigen.calibration.state import State
from vllm_eigen.calibration.statistics.samples import CachedSamples, LayerSamples, cached_samples
from vllm_eigen.calibration.statistics.statistic import Statistic
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.common.errors import UsageError
from vllm_eigen.common.progress import Reporter


@dataclass(frozen=True)
class Recipe:
    """How a model is compressed, whatever the text and the size.

    Attributes:
        method: makes the bases.
        key_mode: where keys are compressed relative to the rotary embedding.
        head_group: neighbouring KV heads that share a latent head.
        refit: whether output projections are fitted to the compressed heads.
        rank_rule: how ranks are chosen for a KV ratio; None where latents are coded.
    """

    method: Method
    key_mode: KeyMode
    head_group: int
    refit: bool
    rank_rule: RankRule | None = None

    @classmethod
    def resolve(
        cls,
        source: Source,
        method: str,
        *,
        key_mode: KeyMode | None = None,
        prefer: Preference = Preference.MEMORY,
        head_group: int | None = None,
        refit: bool | None = None,
        rank_rule: RankRule | None = None,
    ) -> Recipe:
        """The recipe for a model; None stands for the method's or the model's default.

        Raises:
            UsageError: the method does not exist, or model or method do not support a choice.
        """
        chosen = get_method(method)
        if isinstance(chosen, RankMethod):
            rank_rule = rank_rule or chosen.rank_rule
        else:
            if rank_rule is not None:
                raise UsageError(f"method {method} codes directions; a rank rule does not fit it")
            codes_of(source.geometry.head_size)
        return cls(
            chosen,
            _key_mode(key_mode, prefer, source),
            _head_group(head_group, chosen, source.geometry.num_kv_heads),
            chosen.refit if refit is None else refit,
            rank_rule,
        )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The sums that the method needs."""
        if not isinstance(self.method, StatisticsMethod):
            return ()
        return self.method.statistics(self.key_mode, self.head_group)

    @property
    def coded(self) -> bool:
        """Whether latents are coded in bits."""
        return not isinstance(self.method, RankMethod)

    @property
    def uses_gradients(self) -> bool:
        """Whether the method needs a backward pass."""
        return not isinstance(self.method, StatisticsMethod)

    @property
    def needs_probabilities(self) -> bool:
        """Whether the method needs attention probabilities, which eager attention alone returns."""
        return any(item.needs_probabilities for item in self.statistics)


def recipe_of(options: Options, source: Source) -> Recipe:
    """The recipe that the options ask for.

    Raises:
        UsageError: the model or the method does not support it, or the ratio is out of reach.
    """
    # Bases alone cannot carry new projections, and at full rank there is nothing to fit.
    no_refit = options.bases_only or options.target.full_rank
    # At full rank nothing is coded and nothing dropped, whichever method is asked.
    whole = options.target.full_rank and options.method == "coded"
    recipe = Recipe.resolve(
        source,
        "sensitivity" if whole else options.method,
        key_mode=options.key_mode,
        prefer=options.prefer,
        head_group=options.head_group,
        refit=False if no_refit else options.refit,
    )
    if recipe.coded:
        bytes_for(options.target.ratio_of_coded(), source.geometry.head_size)
    return recipe


@dataclass(frozen=True)
class Job:
    """What every stage of a calibration works on.

    Attributes:
        model: the base model, one layer in memory at a time, with its source and device.
        recipe: method, key mode, head group, refit.
        tokens: the calibration windows, int64 [num_windows, length].
        state: where finished layers are kept and found again.
        reporter: shows progress.
        memory_limit: bytes of activations kept in memory.
    """

    model: LayerwiseModel
    recipe: Recipe
    tokens: torch.Tensor
    state: State
    reporter: Reporter
    memory_limit: int = MEMORY_LIMIT

    def first_windows(self, tokens: int) -> torch.Tensor:
        """The first calibration windows that hold `tokens` tokens, rounded down, at least one."""
        return self.tokens[: max(1, tokens // self.tokens.shape[1])]

    def cached(self, samples: LayerSamples) -> CachedSamples:
        """Samples as the recipe's cache holds them."""
        return cached_samples(
            samples,
            self.recipe.key_mode,
            self.model.inverse_frequencies(),
            self.model.source.rotary_positions,
        )

    def stream(self, tokens: torch.Tensor) -> ActivationStream:
        """Hidden states of tokens [num_windows, length] before the first layer."""
        return ActivationStream(
            self.model,
            tokens,
            memory_limit=self.memory_limit,
            offload_folder=self.state.folder,
        )


def _key_mode(asked: KeyMode | None, prefer: Preference, source: Source) -> KeyMode:
    modes = source.family.key_modes
    chosen = asked or prefer.key_mode(modes)
    if chosen not in modes:
        raise UsageError(
            f"--key-cache {chosen} does not fit {source.family.architecture}; "
            f"choose from {', '.join(modes)}"
        )
    return chosen


def _head_group(asked: int | None, method: Method, num_kv_heads: int) -> int:
    if asked is None:
        group = method.head_group
        while num_kv_heads % group:
            group -= 1
        return group
    if asked > method.max_head_group:
        raise UsageError(
            f"--head-group {asked}: method {method.name} goes up to {method.max_head_group}"
        )
    if num_kv_heads % asked:
        raise UsageError(
            f"--head-group {asked} does not divide the model's {num_kv_heads} KV heads"
        )
    return asked
