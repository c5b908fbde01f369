# SPDX-License-Identifier: Apache-2.0
"""Text for the demo and for tests: the language reference inside the Python interpreter.

`help()` carries some 450 KB of it in the standard library (`pydoc_data`), so nothing has to be
shipped or downloaded. A topic belongs to one split, by a hash of its name: the held-out text is of
topics that the calibration never saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from vllm_eigen.calibration.model.text import SEPARATOR
from vllm_eigen.common.files import atomic_file

SPLITS = ("calibration", "heldout")
HELDOUT_PERCENT = 40
_MIN_CHARACTERS = 400


def documents(split: str) -> Iterator[str]:
    """The topics of a split, in order of their hash.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    for name in sorted(topics, key=_digest):
        heldout = _digest(name) % 100 < HELDOUT_PERCENT
        if heldout == (split == "heldout") and len(topics[name]) >= _MIN_CHARACTERS:
            yield topics[name].strip()


def write(split: str, path: Path, max_characters: int | None = None) -> Path:
    """Write the topics of a split, or their first characters, with separators; returns `path`."""
    with atomic_file(path) as work:
        work.write_text(SEPARATOR.join(documents(split))[:max_characters], encoding="utf-8")
    return path


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
