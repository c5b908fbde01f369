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
