# SPDX-License-Identifier: Apache-2.0
"""A closed loop of users on one server, as light on the client as HTTP allows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def tokens_per_second(
    client: Any, model: str, prompts: Sequence[str], *, users: int, tokens: int
) -> float:
    """Output tokens a second of `users` who each ask for `tokens` tokens at the same moment.

    Args:
        client: an `openai` client.
        prompts: taken in turn.
    """

    def ask(index: int) -> int:
        answer = client.completions.create(
            model=model,
            prompt=prompts[index % len(prompts)],
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return int(answer.usage.completion_tokens)

    with ThreadPoolExecutor(users) as pool:
        began = time.monotonic()
        made = sum(pool.map(ask, range(users)))
        return made / (time.monotonic() - began)


def decode_speed(client: Any, model: str, prompt: Sequence[int], tokens: int) -> float:
    """Tokens a second of one user from the first token on: the prompt's time does not count.

    Args:
        client: an `openai` client.
        prompt: token ids, as long as the context is to be.
        tokens: generated, at least two.
    """
    moments: list[float] = []
    made = 0
    answer = client.completions.create(
        model=model,
        prompt=list(prompt),
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    for chunk in answer:
        if chunk.choices:
            moments.append(time.perf_counter())
        if chunk.usage is not None:
            made = int(chunk.usage.completion_tokens)
    return (made - 1) / (moments[-1] - moments[0])
