# SPDX-License-Identifier: Apache-2.0
"""What an engine is asked in a verification: one task for each way that a token takes in vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 32
"""Tokens of a block; what all attention backends take."""
CHUNK = 64
"""Most tokens of a step."""
SEQUENCES = 10
"""Sequences at once."""
POOL = 2.75
"""Sequences of the greatest length that the pool holds."""
LENGTH, MIXED_LENGTH = 256, 1024
"""Tokens of the longest sequence; more where layers with windows are kept, since pages of several
sizes make prefix-cache hits coarse."""
SHORTEST = 2 * CHUNK
"""Positions that a model must have, so that a prompt of several steps fits."""


@dataclass(frozen=True)
class Task:
    """Prompts, and how many tokens to generate after each.

    Attributes:
        name: what is looked at.
        prompts: token ids.
        tokens: generated tokens a prompt, greedily.
        first: prompts that are asked before, for their effect on the prefix cache.
    """

    name: str
    prompts: list[list[int]]
    tokens: int
    first: tuple[list[int], ...] = ()


PREFILL, CHUNKED, DECODE = "prefill", "chunked prefill", "decode"
PREFIX, PREEMPTION = "prefix hit", "preemption"


def tasks(max_model_len: int, vocab_size: int, bos: int | None) -> list[Task]:
    """The tasks of an engine with `CHUNK`, `SEQUENCES` and `POOL`.

    Args:
        max_model_len: tokens of its longest sequence, at least `SHORTEST`.
        vocab_size: ids are drawn below it.
        bos: id that every prompt begins with, if the model has one.
    """
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> list[int]:
        ids: list[int] = torch.randint(vocab_size, (length,), generator=generator).tolist()
        return ids if bos is None else [bos, *ids[1:]]

    long = prompt(max_model_len - 16)
    half = max_model_len // 2
    return [
        Task(PREFILL, [prompt(length) for length in (1, 7, 16, 31, CHUNK - 1)], 1),
        Task(CHUNKED, [prompt(length) for length in (CHUNK + 1, half, max_model_len - 8)], 2),
        Task(DECODE, [prompt(length) for length in (1, 30, 45)], 16),
        Task(PREFIX, [long], 4, first=(long,)),
        # As many as fit are admitted, and outgrow the pool before they end.
        Task(PREEMPTION, [prompt(half // 2) for _ in range(SEQUENCES)], max_model_len // 4),
    ]
