# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice questions in local files, and a model's zero-shot accuracy on them.

A file holds one JSON object a line, `{"ctx", "choices", "gold"}`; `_` in `ctx` marks the blank of a
fill-in question. As in lm-evaluation-harness, a choice is scored by the log-likelihood of its
text after the context (of what follows the blank, for fill-in), both in full and per character.
Tasks by name come from that harness itself (`harness`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_eigen.calibration.evaluation.scoring import Continuation, Scorer
from vllm_eigen.common.errors import InputError


@dataclass(frozen=True)
class Question:
    """Pairs of context and continuation, one per choice, and the index of the correct one."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered correctly.

    Attributes:
        acc: by log-likelihood.
        acc_norm: by log-likelihood divided by the choice's characters; None if the task has none.
        questions: number of them.
    """

    acc: float
    acc_norm: float | None
    questions: int


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Questions of a jsonl file, at most `limit`.

    Raises:
        InputError: the file is missing, or a line is no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"task {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"task {path} is not UTF-8 (byte {error.start})") from error
    questions = []
    for number, line in enumerate(lines[:limit], start=1):
        try:
            item = json.loads(line)
            choices, gold = [str(choice) for choice in item["choices"]], int(item["gold"])
            question = Question(tuple(_pair(str(item["ctx"]), c) for c in choices), gold)
            choices[gold]
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(
                f"task {path}, line {number}: not an object with ctx, choices and gold"
            ) from error
        questions.append(question)
    if not questions:
        raise InputError(f"task {path} is empty")
    return questions


@dataclass(frozen=True)
class Answer:
    """Whether a question was answered correctly: by log-likelihood, and by that per character."""

    right: bool
    right_norm: bool


def accuracy(
    scorer: Scorer,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    length: int,
    step: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Accuracy on the questions; see `answers`."""
    right = right_norm = 0
    for answer in answers(scorer, tokenizer, questions, length=length):
        right += answer.right
        right_norm += answer.right_norm
        step()
    count = len(questions)
    return Accuracy(right / count, right_norm / count, count)


def answers(
    scorer: Scorer, tokenizer: Any, questions: Sequence[Question], *, length: int
) -> Iterator[Answer]:
    """One a question; contexts are cut on the left so that `length` tokens suffice."""
    encoded = [_encode(tokenizer, *pair) for question in questions for pair in question.pairs]
    scored = scorer(Continuation(tokens[-length:], count) for tokens, count in encoded)
    for question in questions:
        scores = [next(scored)[0] for _ in question.pairs]
        sizes = [max(1, len(text.removeprefix(" "))) for _, text in question.pairs]
        shares = [score / size for score, size in zip(scores, sizes, strict=True)]
        yield Answer(_best(scores) == question.gold, _best(shares) == question.gold)


def _pair(context: str, choice: str) -> tuple[str, str]:
    before, blank, after = context.partition("_")
    if blank and after:
        return before + choice, after
    return context, f" {choice}"


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda index: scores[index])


def _encode(tokenizer: Any, context: str, text: str) -> tuple[list[int], int]:
    """Tokens of context and continuation, and how many of them are the continuation's."""
    start: list[int] = tokenizer(context)["input_ids"]
    whole: list[int] = tokenizer(context + text)["input_ids"]
    # Where the two meet tokens may merge: all that differs from the context is continuation.
    same = 0
    while same < min(len(start), len(whole) - 1) and start[same] == whole[same]:
        same += 1
    return whole, len(whole) - max(same, 1)
