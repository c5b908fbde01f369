# SPDX-License-Identifier: Apache-2.0
"""Tables of the reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, right_from: int | None = None
) -> list[str]:
    """Lines of a Markdown table; columns from number `right_from` on are aligned right."""
    left = len(headings) if right_from is None else right_from
    marks = ["---" if column < left else "---:" for column in range(len(headings))]
    lines = [f"| {' | '.join(headings)} |", f"|{'|'.join(marks)}|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]
