# SPDX-License-Identifier: Apache-2.0
"""Rows of the table of `bench quality`: as CSV, which later runs add to, and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vllm_eigen.benchmarks.lib.results import write_csv

NOTE = (
    "Relative perplexity increase in percent by KV ratio, ± two standard errors over the test "
    "windows (paired), and in parentheses the percentage of positions where the likeliest token "
    "stays the same. Float32 in plain transformers, not the engine. `NAME:G` has G KV heads to a "
    "latent head, `post-rope` caches keys after the rotary embedding, `no-refit` keeps the "
    "output projections. Made by `vllm-eigen bench quality`; commands, versions and machine are in "
    "the JSON beside it."
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

    @property
    def key(self) -> tuple[str, str, int, float]:
        """What makes a row unique."""
        return (self.model, self.method, self.samples, self.kv_ratio)


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
    """One table a model: a line per method, a column per ratio."""
    parts = ["# Quality of the calibration methods", "", NOTE]
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        ratios = sorted({row.kv_ratio for row in mine}, reverse=True)
        first = mine[0]
        parts += [
            "",
            f"## {model}",
            "",
            f"Perplexity {first.base_perplexity:.3f} uncompressed, {first.tokens} test tokens, "
            f"windows of {first.seq_len}.",
            "",
            "| method | samples | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
            "|---|---|" + "---|" * len(ratios),
        ]
        for method, samples in dict.fromkeys((row.method, row.samples) for row in mine):
            cells = {
                row.kv_ratio: f"{row.increase:+.2f} ± {row.noise:.2f} ({row.top1:.1f})"
                for row in mine
                if (row.method, row.samples) == (method, samples)
            }
            line = " | ".join(cells.get(ratio, "-") for ratio in ratios)
            parts.append(f"| {method} | {samples} | {line} |")
    return "\n".join(parts) + "\n"
