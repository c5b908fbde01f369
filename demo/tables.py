# SPDX-License-Identifier: Apache-2.0
"""What the demo prints, in 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo.measure import QUESTIONS, Pool, Speeds
from vllm_eigen.benchmarks.lib.spread import Spread

UNDECIDED = "no difference\nmeasured"


def comparison(
    base: Pool, eigen: Pool, quality: Mapping[str, Any], measured: Sequence[Speeds]
) -> Table:
    """Capacity, quality and speed of both models.

    Args:
        quality: what `vllm-eigen evaluate --json` prints.
    """
    table = Table(title="Equal KV-cache bytes, same questions", width=80)
    for heading in ("", "base", "eigen", "eigen / base"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    sizes = (
        ("KV-cache pool, MiB", base.size / 2**20, eigen.size / 2**20, "{:.1f}"),
        ("KV bytes a token", base.token, eigen.token, "{:,.0f}"),
        ("tokens the pool holds", base.tokens, eigen.tokens, "{:,.0f}"),
        (f"users at {base.longest:,} tokens", base.users, eigen.users, "{:.2f}"),
    )
    for label, one, other, form in sizes:
        table.add_row(label, form.format(one), form.format(other), f"{other / one:.3f}")
    table.add_section()
    one, other = quality["base"]["perplexity"], quality["eigen"]["perplexity"]
    table.add_row("perplexity, held out", f"{one:.3f}", f"{other:.3f}", f"{other / one:.4f}")
    table.add_row("KL, nats a token", "", f"{quality['kl_per_token']:.4f}", "")
    for scores in quality["tasks"].values():
        count = scores["base"]["questions"]
        shares = [scores[side]["acc"] for side in ("base", "eigen")]
        table.add_row(
            f"{count} questions, % right", *(_share(share, count) for share in shares), ""
        )
    table.add_section()
    for found in measured:
        table.add_row(
            f"decode/s after {found.context:,}",
            _spread(found.base, "{:.1f}"),
            _spread(found.eigen, "{:.1f}"),
            ratio(found),
        )
    return table


def ratio(found: Speeds) -> str:
    """The median ratio of a speed with its range, or that none was measured."""
    return _spread(found.ratio, "{:.2f}", "" if found.differ else UNDECIDED)


def conversation(console: Console, base: Sequence[str], eigen: Sequence[str]) -> None:
    """Print the chat, the answers side by side."""
    for question, one, other in zip(QUESTIONS, base, eigen, strict=True):
        table = Table(title=f"You: {question}", title_justify="left", width=80)
        for heading in ("base", "eigen"):
            table.add_column(heading, ratio=1)
        table.add_row(Text(one), Text(other))
        console.print(table)


def _share(share: float, count: int) -> str:
    """Per cent with its standard error."""
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / count):.1f}"


def _spread(found: Spread, form: str, middle: str = "") -> str:
    """Median, or other words, and below it the smallest and the largest."""
    low, high = form.format(found.low), form.format(found.high)
    return f"{middle or form.format(found.median)}\n({low} to {high})"
