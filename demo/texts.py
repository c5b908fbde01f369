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
from typing import Any

from vllm_eigen.calibration.model.text import SEPARATOR
from vllm_eigen.common.files import atomic_file

SPLITS = ("calibration", "heldout")
HELDOUT_PERCENT = 40
_MIN_CHARACTERS = 400
_TURNS = 3
"""Questions of a conversation."""
_MIN_ANSWER, _ANSWER = 120, 500
"""Characters of an answer."""


def documents(split: str) -> Iterator[str]:
    """The topics of a split, in order of their hash.

    Raises:
        ValueError: unknown split.
    """
    return (text for _, text in _topics(split))


def conversations(split: str) -> Iterator[list[dict[str, str]]]:
    """Messages about each topic of a split: questions, answered by paragraphs of the reference.

    A chat model is used behind its template, whose tokens plain text never shows.
    """
    for name, text in _topics(split):
        paragraphs = [part.strip() for part in text.split("\n\n")]
        answers = [part for part in paragraphs if len(part) > _MIN_ANSWER][:_TURNS]
        messages = []
        for answer in answers:
            question = f"Explain this about {name}: {' '.join(answer.split()[:8])}"
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer[:_ANSWER]})
        if messages:
            yield messages


def write_for_chat(split: str, path: Path, tokenizer: Any) -> Path:
    """Write the beginning of each topic as it is, and conversations about it; returns `path`."""
    plain = [text[: _TURNS * _ANSWER] for text in documents(split)]
    chats = [
        str(tokenizer.apply_chat_template(messages, tokenize=False))
        for messages in conversations(split)
    ]
    with atomic_file(path) as work:
        work.write_text(SEPARATOR.join(plain + chats), encoding="utf-8")
    return path


def write(split: str, path: Path, max_characters: int | None = None) -> Path:
    """Write the topics of a split, or their first characters, with separators; returns `path`."""
    with atomic_file(path) as work:
        work.write_text(SEPARATOR.join(documents(split))[:max_characters], encoding="utf-8")
    return path


def _topics(split: str) -> Iterator[tuple[str, str]]:
    """Names and texts."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    for name in sorted(topics, key=_digest):
        heldout = _digest(name) % 100 < HELDOUT_PERCENT
        if heldout == (split == "heldout") and len(topics[name]) >= _MIN_CHARACTERS:
            yield name, topics[name].strip()


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
