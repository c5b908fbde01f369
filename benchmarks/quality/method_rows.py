# SPDX-License-Identifier: Apache-2.0
"""Rows of the table of `bench quality`: as CSV, which later runs add to, and as Markdown."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vllm_eigen.benchmarks.lib.results import write_csv
from vllm_eigen.benchmarks.quality.plain_caches import PLAIN_CACHES

NOTE = (
    "By KV ratio, the bytes of the cache relative to bfloat16: relative perplexity increase in "
    "percent, KL divergence from the uncompressed model in nats a token, and the percentage of "
    "positions where the likeliest token stays the same, each ± two standard errors over the test "
    "windows (paired). Float32 in plain transformers, not the engine. `NAME:G` has G KV heads to a "
    "latent head, `post-rope` caches keys after the rotary embedding, `no-refit` keeps the "
    "output projections, `refit` fits them, `global` allocates ranks by measured loss in place of "
    "the method's own rule; `zero-shot` is the share of multiple-choice questions answered "
    "correctly, with the difference from the uncompressed model, paired by question; `windows` is "
    "how many calibrated it, `time` how long that took, with the allocation (wall time on a shared "
    "machine; `-`: not recorded). Made by `vllm-eigen bench quality`; commands, versions and "
    "machine are in the JSON beside it."
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kv_ratio: asked for; `reached` is what the ranks come to.
        perplexity, base_perplexity: on the test windows.
        increase: relative perplexity increase in percent.
        noise: two standard errors of it, from the paired differences of the test windows.
        kl: KL(base || compressed) per token, in nats.
        top1: agreement of the likeliest tokens, in percent.
        samples, seq_len: windows of the calibration and their tokens.
        test_seq_len: tokens of a test window.
        kl_noise, top1_noise: two standard errors; NaN where an older run did not record them.
        seconds: wall time of calibration and allocation; NaN likewise, and without calibration.
        zero_shot: multiple-choice questions answered correctly, in percent; NaN if none were asked.
        zero_shot_change, zero_shot_noise: points more than the base, and two standard errors of
            that, paired by question.
        questions: how many.
    """

    model: str
    method: str
    samples: int
    seq_len: int
    kv_ratio: float
    reached: float
    base_perplexity: float
    perplexity: float
    increase: float
    noise: float
    kl: float
    top1: float
    tokens: int
    rank_k: str
    rank_v: str
    test_seq_len: int
    kl_noise: float = math.nan
    top1_noise: float = math.nan
    seconds: float = math.nan
    zero_shot: float = math.nan
    zero_shot_change: float = math.nan
    zero_shot_noise: float = math.nan
    questions: int = 0

    @property
    def key(self) -> tuple[str, str, int, int, int, float]:
        """What makes a row unique."""
        windows = (self.samples, self.seq_len, self.test_seq_len)
        return (self.model, self.method, *windows, self.kv_ratio)


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier table; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        kinds = {
            field.name: {"str": str, "int": int, "float": float}[str(field.type)]
            for field in fields(Row)
        }
        return [
            Row(**{name: kinds[name](value) for name, value in line.items()})
            for line in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The table as CSV."""
    write_csv(path, [asdict(row) for row in rows])


def markdown(rows: Sequence[Row]) -> str:
    """One table for each model and length of the test windows, from many bytes to few."""
    parts = ["# Quality of the calibration methods", "", NOTE]
    for model, length in dict.fromkeys((row.model, row.test_seq_len) for row in rows):
        mine = [row for row in rows if (row.model, row.test_seq_len) == (model, length)]
        mine.sort(key=lambda row: (-row.reached, row.method, row.samples))
        first = mine[0]
        parts += [
            "",
            f"## {model}, test windows of {length} tokens",
            "",
            f"Perplexity {first.base_perplexity:.3f} uncompressed.",
            "",
            "| KV ratio | method | windows | perplexity, % | KL | same token, % | zero-shot, % "
            "| time, s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in mine:
            plain = row.method in PLAIN_CACHES
            windows = "-" if plain else f"{row.samples} x {row.seq_len}"
            kl = _spread(row.kl, row.kl_noise, ".5f")
            top1 = _spread(row.top1, row.top1_noise, ".2f")
            seconds = "-" if math.isnan(row.seconds) else f"{row.seconds:.0f}"
            parts.append(
                f"| {row.reached:.2f} | {row.method} | {windows} "
                f"| {row.increase:+.2f} ± {row.noise:.2f} | {kl} | {top1} | {_zero_shot(row)} "
                f"| {seconds} |"
            )
    return "\n".join(parts) + "\n"


def _zero_shot(row: Row) -> str:
    if not row.questions:
        return "-"
    return f"{row.zero_shot:.1f} ({row.zero_shot_change:+.1f} ± {row.zero_shot_noise:.1f})"


def _spread(value: float, noise: float, form: str) -> str:
    return f"{value:{form}}" + ("" if math.isnan(noise) else f" ± {noise:{form}}")
