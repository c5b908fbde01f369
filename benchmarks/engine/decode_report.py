# SPDX-License-Identifier: Apache-2.0
"""Table and plot of `vllm-eigen bench engine-decode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_eigen.benchmarks.engine.decode_models import HEAD_SIZE, Settings
from vllm_eigen.benchmarks.lib import plots
from vllm_eigen.benchmarks.lib.markdown import table
from vllm_eigen.benchmarks.lib.results import write_text
from vllm_eigen.benchmarks.lib.spread import Spread
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.common.errors import InputError


@dataclass(frozen=True)
class Row:
    """A model at a context.

    Attributes:
        base, eigen: output tokens a second, medians.
        speedup, low, high: eigen / base, pair by pair: median and quartiles.
    """

    family: str
    heads: int
    kv_heads: int
    key_mode: KeyMode
    rank_k: int
    rank_v: int
    kv_ratio: float
    context: int
    batch: int
    base: float
    eigen: float
    speedup: float
    low: float
    high: float

    @property
    def spread(self) -> Spread:
        """Of the speed-up."""
        return Spread(self.speedup, self.low, self.high)


def to_json(settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """What the result file holds beside its provenance."""
    return {"settings": asdict(settings), "rows": [asdict(row) for row in rows]}


def from_json(document: dict[str, Any]) -> tuple[Settings, list[Row]]:
    """The opposite of `to_json`.

    Raises:
        InputError: the document is no such result.
    """
    try:
        settings = Settings(**document["settings"])
        rows = [Row(**row | {"key_mode": KeyMode(row["key_mode"])}) for row in document["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"this is no result of engine-decode: {error!r}") from error
    return settings, rows


def write_tables(result: Path, settings: Settings, rows: Sequence[Row]) -> str:
    """Write Markdown and plot beside the result; returns the Markdown."""
    text = markdown(settings, rows)
    write_text(result.with_suffix(".md"), text)
    plot(result.with_suffix(".png"), rows)
    return text


def markdown(settings: Settings, rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "# Decoding in the engine, base against Eigen",
        "",
        f"Random models of {settings.layers} layers, hidden size {settings.hidden}, heads of "
        f"{HEAD_SIZE}, {settings.dtype}; {settings.batch} sequences, {settings.threads} threads. "
        "Output tokens a second of both engines, and their ratio pair by pair: median and "
        "quartiles. Made by `vllm-eigen bench engine-decode`; command, versions and machine are "
        "in the JSON beside it.",
        "",
    ]
    titles = ("model", "heads / KV heads", "keys", "ranks K, V", "KV ratio", "context", "pairs")
    pairs = dict(zip(settings.contexts, settings.pairs, strict=True))
    lines += table(
        (*titles, "base", "Eigen", "Eigen / base"),
        [
            (
                row.family,
                f"{row.heads} / {row.kv_heads}",
                row.key_mode,
                f"{row.rank_k}, {row.rank_v}",
                f"{row.kv_ratio:.2f}",
                f"{row.context:,}",
                pairs[row.context],
                f"{row.base:,.1f}",
                f"{row.eigen:,.1f}",
                row.spread.text("{:.2f}"),
            )
            for row in rows
        ],
    )
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Speed-up against context, one line a model."""
    figure, axis = plots.pyplot().subplots(figsize=(7.5, 4.6), layout="constrained")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        name = f"{row.family} {row.heads}/{row.kv_heads}, {row.key_mode} {row.rank_k}+{row.rank_v}"
        lines.setdefault(name, []).append(row)
    for name, mine in lines.items():
        below = [row.speedup - row.low for row in mine]
        above = [row.high - row.speedup for row in mine]
        axis.errorbar(
            [row.context for row in mine],
            [row.speedup for row in mine],
            yerr=[below, above],
            fmt="o-",
            capsize=3,
            label=name,
        )
    axis.axhline(1, color="gray", linewidth=1)
    contexts = sorted({row.context for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axis.set(xlabel="context, tokens", ylabel="output tokens a second, Eigen / base")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    plots.save(figure, path)
