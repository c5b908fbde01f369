# SPDX-License-Identifier: Apache-2.0
"""What the demo asks of its two running servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_eigen.benchmarks.lib.decoding import decode_speed
from vllm_eigen.benchmarks.lib.endpoint import Endpoint
from vllm_eigen.benchmarks.lib.pairs import alternate, ratios
from vllm_eigen.benchmarks.lib.spread import Spread

QUESTIONS = (
    "What is a prime number?",
    "What is the capital of France?",
    "Give me three tips for sleeping well.",
)
ANSWER_TOKENS = 96
DECODED = 32
"""Tokens of one speed measurement."""


@dataclass(frozen=True)
class Pool:
    """A server's KV cache.

    Attributes:
        size: bytes.
        token: bytes of one token, over all layers.
        tokens: that fit.
        longest: tokens of the longest sequence served.
    """

    size: int
    token: int
    tokens: int
    longest: int

    @property
    def users(self) -> float:
        """Sequences of full length that fit."""
        return self.tokens / self.longest


@dataclass(frozen=True)
class Speeds:
    """Decode tokens a second of both servers at one context length, and the paired ratios."""

    context: int
    base: Spread
    eigen: Spread
    ratio: Spread

    @property
    def differ(self) -> bool:
        """Whether all pairs agree on which server is faster."""
        return not self.ratio.low <= 1 <= self.ratio.high


def pool(endpoint: Endpoint) -> Pool:
    """The cache as `/v1/kv_cache` reports it."""
    found = endpoint.kv_cache()
    return Pool(
        int(found["pool_bytes"]),
        int(found["bytes_per_token"]),
        int(found["tokens"]["capacity"]),
        int(found["max_model_len"]),
    )


def chat(endpoint: Endpoint) -> list[str]:
    """Greedy answers to `QUESTIONS`, one conversation; "..." ends one that was cut."""
    client, model = endpoint.openai(), endpoint.model()
    messages: list[dict[str, str]] = []
    answers = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer: Any = client.chat.completions.create(
            model=model, messages=messages, max_tokens=ANSWER_TOKENS, temperature=0
        )
        choice = answer.choices[0]
        messages.append({"role": "assistant", "content": choice.message.content})
        cut = " ..." if choice.finish_reason == "length" else ""
        answers.append(choice.message.content.strip() + cut)
    return answers


def speeds(
    base: Endpoint,
    eigen: Endpoint,
    tokens: Sequence[int],
    context: int,
    repeats: int,
    tick: Callable[[], None],
) -> Speeds:
    """Decode speed after `context` tokens of a text, both servers in turn.

    The first pair is left out: there the prompt enters the prefix cache.
    """
    sides = [(side.openai(), side.model()) for side in (base, eigen)]
    prompt = tokens[:context]

    def measure(side: int) -> float:
        return decode_speed(*sides[side], prompt, DECODED)

    one, other = alternate(measure, repeats, 1, tick)
    return Speeds(
        context, Spread.extremes(one), Spread.extremes(other), Spread.extremes(ratios(one, other))
    )
