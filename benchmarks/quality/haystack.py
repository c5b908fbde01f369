# SPDX-License-Identifier: Apache-2.0
"""Long texts with facts hidden in them, and questions about the facts.

The tasks follow RULER (Hsieh et al. 2024): many facts have one form, so that a model must find the
right key and not just any number, and some questions need several facts. All tasks share a text,
so that it enters a prefix cache once.
"""

from __future__ import annotations

import random
import re
import string
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from vllm_eigen.common.errors import InputError

NAMES = (
    "Alice", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "James",
    "Karen", "Louis", "Maria", "Nigel", "Olivia", "Peter", "Queenie", "Robert", "Sarah", "Thomas",
    "Ursula", "Victor", "Wendy", "Xavier", "Yvonne", "Zachary",
)  # fmt: skip
DIGITS = 5
SEVERAL = 4
"""Keys of a multi-query question, and values of a multi-value one."""
HOPS = 4
"""Assignments of a chain of variables after the first."""
MOST_EXPECTED = max(SEVERAL, HOPS + 1)
"""Strings that an answer must contain at most."""
TASKS = ("multi-key", "multi-query", "multi-value", "variable tracking")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        task: one of `TASKS`.
        tokens: ids to be put after the text.
        expected: what the answer must contain.
    """

    task: str
    tokens: tuple[int, ...]
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Haystack:
    """One text and its questions.

    Attributes:
        tokens: ids of the text with its facts.
        questions: about it.
        depths: where in the text each fact stands, 0 the beginning and 1 the end.
    """

    tokens: tuple[int, ...]
    questions: tuple[Question, ...]
    depths: tuple[float, ...]


class _Asked(NamedTuple):
    """A question as text, with the beginning of its answer."""

    task: str
    question: str
    answer: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class _Facts:
    """Facts in their order, and the questions about them."""

    facts: list[str]
    asked: list[_Asked]


def haystacks(
    tokenizer: Any, text: str, *, length: int, keys: int, number: int, seed: int
) -> list[Haystack]:
    """Texts of at most `length` tokens with their questions; facts are spread over each evenly.

    Args:
        tokenizer: of the model.
        text: what the facts are hidden in; each haystack takes its own part of it.
        length: tokens of a text and a question together.
        keys: names with a code of their own, from `SEVERAL` to `len(NAMES)`.
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
        groups = [_codes(draw, keys), _several_values(draw), _variables(draw)]
        facts = [encode(f"{fact}\n") for fact in _merged(draw, [item.facts for item in groups])]
        questions = tuple(
            Question(task, tuple(encode(f"\nQuestion: {asked}\nAnswer: {answer}")), expected)
            for group in groups
            for task, asked, answer, expected in group.asked
        )
        longest = max(len(question.tokens) for question in questions)
        room = length - len(begin) - longest - sum(map(len, facts))
        parts: list[list[int]] = []
        while room > 0 and lines:
            part = encode(lines.pop(0) + "\n")[:room]
            parts.append(part)
            room -= len(part)
        if room != 0 or not parts:
            raise InputError(
                f"the text is too short for {number} haystacks of {length} tokens, or the facts "
                "are too many for these; give more text with --text, or fewer --haystacks or --keys"
            )
        tokens = list(begin)
        starts = []
        for index, part in enumerate(parts):
            # The k-th fact stands before part number k * parts / facts.
            first, last = (-(-place * len(facts) // len(parts)) for place in (index, index + 1))
            for fact in facts[first:last]:
                starts.append(len(tokens))
                tokens += fact
            tokens += part
        depths = tuple(start / len(tokens) for start in starts)
        found.append(Haystack(tuple(tokens), questions, depths))
    return found


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _codes(draw: random.Random, keys: int) -> _Facts:
    """A code for each name; asked for one, and for several at once."""
    codes = {name: _number(draw) for name in draw.sample(NAMES, keys)}
    asked = [
        _Asked(
            "multi-key",
            f"What is the door code of {name}?",
            f"The door code of {name} is",
            (code,),
        )
        for name, code in codes.items()
    ]
    names = list(codes)
    for start in range(0, keys - SEVERAL + 1, SEVERAL):
        some = names[start : start + SEVERAL]
        listed = f"{', '.join(some[:-1])} and {some[-1]}"
        asked.append(
            _Asked(
                "multi-query",
                f"What are the door codes of {listed}?",
                f"The door codes of {listed} are",
                tuple(codes[name] for name in some),
            )
        )
    facts = [f"The door code of {name} is {code}." for name, code in codes.items()]
    return _Facts(facts, asked)


def _several_values(draw: random.Random) -> _Facts:
    """Several numbers for each of some names, all of them asked for."""
    numbers = {name: [_number(draw) for _ in range(SEVERAL)] for name in draw.sample(NAMES, 2)}
    facts = [
        f"One of the parcel numbers of {name} is {number}."
        for name, many in numbers.items()
        for number in many
    ]
    draw.shuffle(facts)
    asked = [
        _Asked(
            "multi-value",
            f"What are all {SEVERAL} parcel numbers of {name}?",
            f"The parcel numbers of {name} are",
            tuple(many),
        )
        for name, many in numbers.items()
    ]
    return _Facts(facts, asked)


def _variables(draw: random.Random) -> _Facts:
    """A chain of assignments; all its variables are asked for."""
    letters = "".join(draw.sample(string.ascii_uppercase, len(string.ascii_uppercase)))
    chain = [letters[4 * place : 4 * place + 4] for place in range(HOPS + 1)]
    number = _number(draw)
    facts = [f"VAR {chain[0]} = {number}."]
    facts += [f"VAR {new} = VAR {old}." for old, new in pairwise(chain)]
    asked = _Asked(
        "variable tracking",
        f"Which {len(chain)} variables have the value {number}?",
        f"The variables with the value {number} are VAR",
        tuple(chain),
    )
    return _Facts(facts, [asked])


def _merged(draw: random.Random, groups: list[list[str]]) -> list[str]:
    """All facts in random order, those of a group in theirs."""
    order = [index for index, group in enumerate(groups) for _ in group]
    draw.shuffle(order)
    sources = [iter(group) for group in groups]
    return [next(sources[index]) for index in order]
