# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a model as served, from the log-probabilities the server gives its prompt.

Used by the demo and by `vllm-eigen bench serve`: what the engine, its cache and its kernels really
compute, not what transformers would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from vllm_eigen.common.errors import InputError

WINDOW = 1024
"""Tokens of a window; the first is not scored."""
WINDOWS = 16


def served_perplexity(
    client: Any,
    name: str,
    tokens: Sequence[int],
    max_model_len: int,
    *,
    windows: int = WINDOWS,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Perplexity a token over consecutive windows of a text.

    Args:
        client: an `openai.OpenAI` client of the server.
        name: the model's name there.
        tokens: the text.
        max_model_len: tokens of the longest sequence served.
        windows: at most so many windows are read.
        step: called before each window with its number, from 1, and how many there are.

    Raises:
        InputError: the text is shorter than one window.
    """
    window = min(WINDOW, max_model_len - 1)
    starts = range(0, min(len(tokens), windows * window) - window + 1, window)
    losses: list[float] = []
    for index, start in enumerate(starts):
        step(index + 1, len(starts))
        answer = client.completions.create(
            model=name,
            prompt=list(tokens[start : start + window]),
            max_tokens=1,
            echo=True,
            logprobs=1,
            temperature=0,
        )
        losses += [-value for value in answer.choices[0].logprobs.token_logprobs[1:window]]
    if not losses:
        raise InputError(f"the text has {len(tokens)} tokens, a perplexity needs {window}")
    return math.exp(sum(losses) / len(losses))
