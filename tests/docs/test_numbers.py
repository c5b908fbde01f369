# SPDX-License-Identifier: Apache-2.0
"""Numbers in README and docs are those of the result files that their table rows name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/results.md")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
LINK = re.compile(r"\[[^\]]*\]\((?:\.\./)*(benchmarks/results/[\w./-]+)\)")


def _tables(page: str) -> Iterator[list[list[str]]]:
    """Cells of each table of a page, the header first, without the ruler."""
    table: list[list[str]] = []
    for line in [*(ROOT / page).read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        elif table:
            yield [table[0], *table[2:]]
            table = []


def _cells(page: str) -> Iterator[tuple[str, str]]:
    """Cells with numbers, and the link to the file that they come from.

    The files stand in a last column `from`, one a row, or in a last row `from`, one a column.
    """
    for header, *rows in _tables(page):
        if header[-1] == "from":
            yield from ((cell, row[-1]) for row in rows for cell in row[1:-1])
        elif rows[-1][0] == "from":
            yield from (
                pair for row in rows[:-1] for pair in zip(row[1:], rows[-1][1:], strict=True)
            )


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in NUMBER.findall(text)]


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_the_result_files(page: str) -> None:
    checked = 0
    for cell, source in _cells(page):
        link = LINK.search(source)
        assert link, f"{page}: {source!r} names no file of benchmarks/results"
        text = (ROOT / link[1]).read_text(encoding="utf-8")
        known = _numbers(text.replace(",", " ") if link[1].endswith(".csv") else text)
        for shown in NUMBER.findall(cell):
            number = shown.replace(",", "")
            digits = len(number.partition(".")[2])
            step = 0.51 * 10**-digits
            near = any(abs(value - float(number)) <= step for value in known)
            assert near, f"{page}: {shown} of {cell!r} is not in {link[1]}"
            checked += 1
    assert checked > 3


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120
