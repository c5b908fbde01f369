# SPDX-License-Identifier: Apache-2.0
"""Long texts with facts hidden in them: the "needle in a haystack" test with several keys.

As in RULER (Hsieh et al. 2024, "NIAH multi-key"), every text hides many facts of one form, and a
question asks for one of them, so that the model must find the right key and not just any number.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from vllm_eigen.common.errors import InputError

NAMES = (
    "Alice", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "James",
    "Karen", "Louis", "Maria", "Nigel", "Olivia", "Peter", "Queenie", "Robert", "Sarah", "Thomas",
    "Ursula", "Victor", "Wendy", "Xavier", "Yvonne", "Zachary",
)  # fmt: skip
DIGITS = 5


@dataclass(frozen=True)
class Haystack:
    """One text and its questions.

    Attributes:
        tokens: ids of the text with its facts.
        questions: ids of each question, to be put after the text.
        answers: digits that must come first in each answer.
        depths: where in the text each fact stands, 0 the beginning and 1 the end.
    """

    tokens: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...]
    depths: tuple[float, ...]


def haystacks(
    tokenizer: Any, text: str, *, length: int, keys: int, number: int, seed: int
) -> list[Haystack]:
    """Texts of at most `length` tokens with their questions; facts are spread over each evenly.

    Args:
        tokenizer: of the model.
        text: what the facts are hidden in; each haystack takes its own part of it.
        length: tokens of a text and a question together.
        keys: facts a text, at most `len(NAMES)`.
        number: texts.

    Raises:
        InputError: the text is too short, or the facts do not fit.
    """
    draw = random.Random(seed)
    # Sentences of paragraphs: facts come between them.
    lines = [
        sentence
        for line in text.splitlines()
        if len(line.strip()) > 80
        for sentence in re.split(r"(?<=\.) ", line.strip())
    ]
    begin = tokenizer("")["input_ids"]

    def encode(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    found = []
    for _ in range(number):
        names = draw.sample(NAMES, keys)
        codes = [str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for _ in names]
        facts = [
            encode(f"The door code of {name} is {code}.\n")
            for name, code in zip(names, codes, strict=True)
        ]
        questions = [
            encode(
                f"\nQuestion: What is the door code of {name}?\nAnswer: The door code of {name} is"
            )
            for name in names
        ]
        room = length - len(begin) - max(map(len, questions)) - sum(map(len, facts))
        parts: list[list[int]] = []
        while room > 0 and lines:
            part = encode(lines.pop(0) + "\n")[:room]
            parts.append(part)
            room -= len(part)
        if room != 0 or len(parts) < keys:
            raise InputError(
                f"the text is too short for {number} haystacks of {length} tokens with {keys} "
                "facts; give more text with --text, or fewer --haystacks"
            )
        tokens = list(begin)
        starts = []
        for index, part in enumerate(parts):
            # The k-th fact stands before part number k * parts / keys.
            for fact in facts[
                -(-index * keys // len(parts)) : -(-(index + 1) * keys // len(parts))
            ]:
                starts.append(len(tokens))
                tokens += fact
            tokens += part
        found.append(
            Haystack(
                tuple(tokens),
                tuple(map(tuple, questions)),
                tuple(codes),
                tuple(start / len(tokens) for start in starts),
            )
        )
    return found
