"""Multiple-choice questions for the shipped model: which text goes on from this beginning?

Made from the held-out split of `demo.corpus`: a context, its own next words, and the same number of
words from three other places. Used to compare scores of a served model with the offline evaluation.

Usage: python -m demo.questions --output FILE --count N
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from demo.corpus import documents
from vllm_eigen.files import atomic_file

CONTEXT_WORDS = 24
CHOICE_WORDS = 5
CHOICES = 4


def questions(texts: Iterable[str], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """At most `count` questions of `ctx`, `choices` and `gold`, one a text, in random order."""
    pairs = []
    for text in texts:
        words = text.split()
        if len(words) >= CONTEXT_WORDS + CHOICE_WORDS:
            following = words[CONTEXT_WORDS : CONTEXT_WORDS + CHOICE_WORDS]
            pairs.append((" ".join(words[:CONTEXT_WORDS]), " ".join(following)))
    draw = random.Random(seed)
    draw.shuffle(pairs)
    found = []
    for context, ending in pairs[:count]:
        others = sorted({other for _, other in pairs} - {ending})
        if len(others) < CHOICES - 1:
            break
        choices = draw.sample(others, CHOICES - 1)
        gold = draw.randrange(CHOICES)
        choices.insert(gold, ending)
        found.append({"ctx": context, "choices": choices, "gold": gold})
    return found


def write(path: Path, count: int, sources: Iterable[str] | None = None) -> int:
    """Write questions as JSON lines; returns how many. `sources` are as in `demo.corpus`."""
    found = questions(islice(documents("heldout", sources), 4 * count), count)
    with atomic_file(path) as work:
        work.write_text("".join(json.dumps(item) + "\n" for item in found), encoding="utf-8")
    return len(found)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write multiple-choice questions.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=400)
    arguments = parser.parse_args()
    count = write(arguments.output, arguments.count)
    print(f"{arguments.output}: {count} questions")


if __name__ == "__main__":
    main()
