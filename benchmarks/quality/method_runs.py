# SPDX-License-Identifier: Apache-2.0
"""One model calibrated by several methods, each measured at several sizes: `bench quality`."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_eigen.benchmarks.lib.spread import two_errors
from vllm_eigen.benchmarks.quality.method_rows import Row
from vllm_eigen.benchmarks.quality.plain_caches import PLAIN_CACHES, PlainCache
from vllm_eigen.benchmarks.quality.streamed_scores import ZeroShot
from vllm_eigen.calibration.held_out import HeldOut
from vllm_eigen.calibration.job import Job, Recipe
from vllm_eigen.calibration.methods.base import RankRule
from vllm_eigen.calibration.methods.basis import LayerMaps
from vllm_eigen.calibration.model.device import pick_device
from vllm_eigen.calibration.model.hooks import LayerCache
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.source import Source, open_source
from vllm_eigen.calibration.model.text import all_windows, read_files, sample_windows
from vllm_eigen.calibration.reporting.sweep import calibrator_of
from vllm_eigen.calibration.state import State
from vllm_eigen.calibration.target import Target
from vllm_eigen.calibration.truncated import TruncatedModel
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.common.errors import UsageError
from vllm_eigen.common.progress import Reporter

OPTIONS = ("post-rope", "no-refit", "refit", "global")


@dataclass(frozen=True)
class Variant:
    """A method as the table names it: `NAME[:HEAD_GROUP][:post-rope][:no-refit][:refit][:global]`.

    Attributes:
        refit: None for the method's own choice.
        rank_rule: likewise.
    """

    label: str
    method: str
    head_group: int
    post_rope: bool
    refit: bool | None = None
    rank_rule: RankRule | None = None

    def recipe(self, source: Source) -> Recipe:
        """What it is for a model.

        Raises:
            UsageError: the method is unknown, or does not fit the model.
        """
        return Recipe.resolve(
            source,
            self.method,
            key_mode=KeyMode.POST_ROPE if self.post_rope else None,
            head_group=self.head_group,
            refit=self.refit,
            rank_rule=self.rank_rule,
        )

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read a label.

        Raises:
            UsageError: an option is unknown.
        """
        name, *options = text.split(":")
        groups = [int(part) for part in options if part.isdigit()]
        unknown = {part for part in options if not part.isdigit()} - set(OPTIONS)
        if unknown:
            raise UsageError(
                f"--methods {text}: {min(unknown)!r} is unknown; choose from {', '.join(OPTIONS)}"
            )
        refits = {"refit": True, "no-refit": False}
        refit = next((refits[part] for part in options if part in refits), None)
        rule = RankRule.GLOBAL if "global" in options else None
        return cls(text, name, (groups or [1])[0], "post-rope" in options, refit, rule)


class MethodRuns:
    """One model with its calibration and test windows.

    Raises:
        InputError: the model or a text cannot be used.
    """

    def __init__(self, model: str, args: argparse.Namespace, reporter: Reporter) -> None:
        self._source = open_source(model)
        self._model = LayerwiseModel(self._source, pick_device(args.device))
        self._reporter = reporter
        tokenizer, size = self._source.tokenizer(), self._source.vocab_size
        positions = self._source.max_positions
        length = min(args.seq_len, positions)
        self._test_length = min(args.test_seq_len or length, positions)
        self._calibration = sample_windows(
            read_files(args.text),
            tokenizer,
            samples=args.samples,
            length=length,
            seed=args.seed,
            vocab_size=size,
        ).chosen
        test = all_windows(
            read_files(args.test),
            tokenizer,
            length=self._test_length,
            vocab_size=size,
            limit=args.test_tokens,
        )
        self._held_out = HeldOut(self._model, test)
        self._zero_shot = (
            ZeroShot(self._model, tokenizer, args.questions, args.limit) if args.questions else None
        )

    def rows(self, variant: Variant, ratios: Sequence[float]) -> list[Row]:
        """Calibrate once, then allocate and measure for every ratio; plain caches have one only."""
        if variant.method in PLAIN_CACHES:
            return [self._plain(variant, PLAIN_CACHES[variant.method])]
        recipe = variant.recipe(self._source)
        job = Job(self._model, recipe, self._calibration, State(), self._reporter)
        began = time.monotonic()
        calibrator = calibrator_of(job, Target(min(ratios)))
        calibration = time.monotonic() - began
        rows = []
        for ratio in ratios:
            began = time.monotonic()
            try:
                allocation = calibrator.allocate(Target(ratio))
            except UsageError as error:
                self._reporter.note(f"{variant.label}: {error}")
                continue
            compressed = calibrator.compress(allocation.ranks)
            seconds = calibration + time.monotonic() - began
            reached = compressed.kv_ratio
            rows.append(self._row(variant, ratio, compressed, reached, seconds=seconds))
        return rows

    def _plain(self, variant: Variant, cache: PlainCache) -> Row:
        """The base model with a cache of another element type."""
        geometry = self._source.geometry
        size = geometry.head_size
        unit = torch.eye(size).expand(geometry.num_kv_heads, size, size)
        layers = len(self._model.compressed_layers)
        compressed = TruncatedModel(
            self._model,
            (LayerMaps((unit, unit), (unit, unit)),) * layers,
            (LayerRanks(rank_k=size, rank_v=size),) * layers,
            # Keys are cached after RoPE there.
            self._source.family.key_modes[-1],
        )
        ratio = cache.bytes_per_head(size) / (2 * size)
        return self._row(variant, round(ratio, 4), compressed, ratio, cache=cache.cache)

    def _row(
        self,
        variant: Variant,
        ratio: float,
        compressed: TruncatedModel,
        reached: float,
        *,
        cache: LayerCache | None = None,
        seconds: float = math.nan,
    ) -> Row:
        windows = self._held_out.quality_by_window(compressed, cache)
        base = statistics.fmean(math.log(item.base_perplexity) for item in windows)
        gaps = [math.log(item.eigen_perplexity / item.base_perplexity) for item in windows]
        losses = [item.kl_per_token for item in windows]
        same = [100 * item.top1_agreement for item in windows]
        growth = math.exp(statistics.fmean(gaps))
        answered = {} if self._zero_shot is None else _answered(self._zero_shot, compressed, cache)
        row = Row(
            model=self._source.name,
            method=variant.label,
            samples=len(self._calibration),
            seq_len=self._calibration.shape[1],
            kv_ratio=ratio,
            reached=round(reached, 4),
            base_perplexity=round(math.exp(base), 5),
            perplexity=round(math.exp(base) * growth, 5),
            increase=round(100 * (growth - 1), 3),
            noise=round(100 * two_errors(gaps) * growth, 3),
            kl=round(statistics.fmean(losses), 6),
            top1=round(statistics.fmean(same), 2),
            tokens=sum(item.tokens for item in windows),
            rank_k=" ".join(str(item.rank_k) for item in compressed.ranks),
            rank_v=" ".join(str(item.rank_v) for item in compressed.ranks),
            test_seq_len=self._test_length,
            kl_noise=round(two_errors(losses), 6),
            top1_noise=round(two_errors(same), 2),
            seconds=round(seconds, 1),
            **answered,
        )
        self._reporter.note(
            f"{row.model} {variant.label} {row.reached:g}: {row.increase:+.2f} % "
            f"(noise {row.noise:.2f}), KL {row.kl:.5f}"
        )
        return row


def _answered(
    zero_shot: ZeroShot, compressed: TruncatedModel, cache: LayerCache | None
) -> dict[str, Any]:
    """The fields of a row about multiple-choice questions."""
    right = zero_shot.right(compressed, cache)
    change = [100 * (int(a) - int(b)) for a, b in zip(right, zero_shot.base, strict=True)]
    return {
        "zero_shot": round(100 * statistics.fmean(right), 2),
        "zero_shot_change": round(statistics.fmean(change), 2),
        "zero_shot_noise": round(two_errors(change), 2),
        "questions": len(right),
    }
