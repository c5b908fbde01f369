# SPDX-License-Identifier: Apache-2.0
"""Rows of `vllm-eigen bench overheads`, their file and their table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_eigen.benchmarks.lib.markdown import table
from vllm_eigen.benchmarks.lib.pairs import ratios
from vllm_eigen.benchmarks.lib.results import read_json, write_json, write_text
from vllm_eigen.benchmarks.lib.spread import Spread
from vllm_eigen.common.errors import InputError


@dataclass(frozen=True)
class Overhead:
    """One comparison.

    Attributes:
        what: the question.
        unit: seconds, us/token (less is better) or tokens/s (more is better).
        one, other: medians of the two sides.
        ratios: other / one, pair by pair.
        median, low, high: of the ratios, with their quartiles.
    """

    what: str
    unit: str
    one: float
    other: float
    ratios: tuple[float, ...]
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, what: str, unit: str, one: Sequence[float], other: Sequence[float]) -> Overhead:
        """From at least two pairs."""
        pairs = ratios(one, other)
        spread = Spread.quartiles(pairs)
        return cls(
            what,
            unit,
            statistics.median(one),
            statistics.median(other),
            tuple(round(pair, 4) for pair in pairs),
            spread.median,
            spread.low,
            spread.high,
        )


def stored(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of earlier runs by `what`; none if there is no file.

    Raises:
        InputError: the file is no such result.
    """
    if not path.exists():
        return {}
    try:
        return {row["what"]: row for row in read_json(path)["rows"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is no result of the overheads benchmark") from error


def save(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the JSON, and the table beside it."""
    write_json(path, {"rows": list(rows.values())})
    write_text(path.with_suffix(".md"), markdown(rows.values()))


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table; `rows` are `Overhead`s as dictionaries."""
    lines = [
        "# What the parts cost that are not attention",
        "",
        "Ratios of the second to the first, pair by pair: median and quartiles. Made by "
        "`vllm-eigen bench overheads`; commands, versions and machines are in the JSON beside it.",
        "",
    ]
    lines += table(
        ("what", "first", "second", "ratio", "pairs"),
        [
            (
                row["what"],
                f"{row['one']:,.4g} {row['unit']}",
                f"{row['other']:,.4g} {row['unit']}",
                Spread(row["median"], row["low"], row["high"]).text("{:.3f}"),
                len(row["ratios"]),
            )
            for row in rows
        ],
    )
    return "\n".join(lines) + "\n"
