# SPDX-License-Identifier: Apache-2.0
"""Every source file names its licence in its first line, or the second after what must be first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".venv", "build", "dist"}
SUFFIXES = {".py", ".h", ".cpp", ".js", ".css", ".html"}
HEADER = "SPDX-License-Identifier: Apache-2.0"


def _sources() -> Iterator[Path]:
    for folder in ROOT.iterdir():
        if folder.name not in SKIPPED and not folder.name.startswith("."):
            for path in folder.rglob("*"):
                if path.suffix in SUFFIXES and path.is_file():
                    yield path


def test_sources_name_their_licence() -> None:
    found = list(_sources())
    assert len(found) > 200
    missing = []
    for path in found:
        first, second, *_ = [*path.read_text(encoding="utf-8").splitlines(), "", ""]
        line = second if first.startswith(("#!", "<!doctype")) else first
        if HEADER not in line:
            missing.append(str(path.relative_to(ROOT)))
    assert missing == []
