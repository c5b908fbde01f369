# SPDX-License-Identifier: Apache-2.0
"""Calibration and evaluation text: files or a Hugging Face data set, cut into token windows.

`<|endoftext|>` separates documents in a file. A tokenizer that puts a beginning-of-text token
before a text does so before each document and each window; after the documents of one that does
not, its end-of-text token follows, if it has one. That is what models of either kind were
trained to see.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vllm_eigen.common.errors import InputError, first_line
from vllm_eigen.common.packages import missing_package

SEPARATOR = "<|endoftext|>"
_SURPLUS = 2
"""Tokens read per token needed: windows are sampled from the surplus, the rest is held out."""


@dataclass(frozen=True)
class Corpus:
    """Documents and where they come from.

    Attributes:
        name: file names or data set, safe to publish.
        documents: non-empty texts in their order.
    """

    name: str
    documents: Sequence[str]


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length.

    Attributes:
        chosen: [num_windows, length], int64.
        held_out: windows of the same text that were not chosen, [at most `held_out`, length].
        available: windows the text gave.
        unknown: share of the tokens that are the tokenizer's unknown token.
    """

    chosen: torch.Tensor
    held_out: torch.Tensor
    available: int
    unknown: float


def read_files(paths: Iterable[str | Path]) -> Corpus:
    """Documents of UTF-8 text files.

    Raises:
        InputError: a file is missing, not text, or all of them are empty.
    """
    files = [Path(path) for path in paths]
    documents: list[str] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"text {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"text {path} is not UTF-8 (byte {error.start}); convert it"
            ) from error
        documents += [part for part in text.split(SEPARATOR) if part.strip()]
    names = ", ".join(path.name for path in files)
    if not documents:
        raise InputError(f"text {names} is empty; pass a file with some pages of prose")
    return Corpus(names, documents)


def read_dataset(name: str, config: str | None, split: str, limit: int = 200_000) -> Corpus:
    """Documents of a Hugging Face data set's `text` column, at most `limit` rows, streamed.

    Raises:
        InputError: the data set cannot be loaded or has no text.
    """
    title = "/".join(part for part in (name, config, split) if part)
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing_package(error, "or pass --text") or error from error
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        texts = [row.get("text") for row in islice(rows, limit)]
    except Exception as error:
        raise InputError(
            f"data set {title} cannot be loaded ({first_line(error)}); or pass --text"
        ) from error
    lines = [text for text in texts if isinstance(text, str)]
    if not any(line.strip() for line in lines):
        raise InputError(f"data set {title} has no text in a column named `text`")
    if sum(line.endswith("\n") for line in lines) > len(lines) / 2:
        return Corpus(title, ["".join(lines)])  # One row a line, as in WikiText.
    return Corpus(title, [line for line in lines if line.strip()])


def sample_windows(
    corpus: Corpus,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int,
    held_out: int = 0,
) -> Windows:
    """Cut `samples` windows of `length` tokens out of the corpus at random.

    The same corpus, tokenizer and seed give the same windows. A text that gives fewer is used
    whole; at least one window must fit.

    Raises:
        InputError: the text is too short, or its tokens do not fit the model.
    """
    rng = random.Random(seed)
    order = list(corpus.documents)
    rng.shuffle(order)
    wanted = (samples + held_out) * length
    start = _prefix(tokenizer)
    tokens = _tokenize(order, tokenizer, start, vocab_size, stop=_SURPLUS * wanted)
    windows = _cut(tokens, start, length, corpus.name)
    available = len(windows)
    picked = list(range(available))
    rng.shuffle(picked)
    # A short text is not starved of calibration for the sake of a held-out part.
    count = min(samples, max(1, available - min(held_out, available // 8)))
    rest = picked[count : count + held_out]
    return Windows(
        windows[picked[:count]], windows[rest], available, _unknown_share(tokens, tokenizer)
    )


def all_windows(
    corpus: Corpus, tokenizer: Any, *, length: int, vocab_size: int, limit: int | None = None
) -> torch.Tensor:
    """The whole corpus in order as windows [num_windows, length]; `limit` bounds the tokens.

    A text of fewer tokens is one shorter window.

    Raises:
        InputError: the text has no two tokens, or its tokens do not fit the model.
    """
    start = _prefix(tokenizer)
    tokens = _tokenize(corpus.documents, tokenizer, start, vocab_size, stop=limit)
    length = max(2, min(length, len(start) + len(tokens), length if limit is None else limit))
    windows = _cut(tokens, start, length, corpus.name)
    return windows if limit is None else windows[: max(1, limit // length)]


def _tokenize(
    documents: Sequence[str],
    tokenizer: Any,
    start: list[int],
    vocab_size: int,
    stop: int | None,
) -> list[int]:
    end = [] if start or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for document in documents:
        # A whole book is one sequence here: silence the warning about the model's length.
        body = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += start + body + end
        if stop is not None and len(tokens) >= stop:
            break
    if tokens and max(tokens) >= vocab_size:
        raise InputError(
            f"the tokenizer gives token {max(tokens)}, the model knows {vocab_size}; "
            "the folder holds another model's tokenizer"
        )
    return tokens


def _prefix(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before a text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _cut(tokens: list[int], prefix: list[int], length: int, name: str) -> torch.Tensor:
    """[num_windows, length]; the incomplete last window is dropped."""
    step = length - len(prefix)
    count = len(tokens) // step if step > 0 else 0
    if count < 1:
        raise InputError(
            f"text {name} is too short: {len(tokens)} tokens, one window takes {length}; "
            "pass more text, or shorter windows where the command has --seq-len"
        )
    body = torch.tensor(tokens[: count * step], dtype=torch.int64).view(count, step)
    start = torch.tensor(prefix, dtype=torch.int64).expand(count, -1)
    return torch.cat([start, body], dim=1)


def _unknown_share(tokens: list[int], tokenizer: Any) -> float:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return 0.0
    return tokens.count(unknown) / max(1, len(tokens))
