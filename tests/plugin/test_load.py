# SPDX-License-Identifier: Apache-2.0
"""Batched, chunked and preempted under load, a request gets the answer it gets alone."""

from __future__ import annotations

import random

import pytest

from tests.plugin.conftest import Models
from tests.plugin.harness.engine import ask, cached_bytes, engine, metric, prompts

BLOCK = 16
BLOCKS = 60


@pytest.mark.feature("64 mixed requests with 20 preemptions: answers as each alone")
@pytest.mark.slow
def test_64_mixed_requests_equal_each_alone(models: Models) -> None:
    folder = models("llama", "float32", 0.6)
    generator = random.Random(20)
    asked = prompts([generator.randint(1, 300) for _ in range(64)], seed=20)
    lengths = [generator.randint(20, 120) for _ in asked]
    with engine(
        folder,
        block_size=BLOCK,
        kv_cache_memory_bytes=BLOCKS * BLOCK * cached_bytes(folder, 4),
        max_model_len=512,
        max_num_batched_tokens=160,
        max_num_seqs=32,
        enable_prefix_caching=False,
    ) as llm:
        alone = [
            ask(llm, [prompt], length, logits=False)[0]
            for prompt, length in zip(asked, lengths, strict=True)
        ]
        assert metric(llm, "vllm:num_preemptions") == 0
        together = ask(llm, asked, lengths, logits=False)
        assert metric(llm, "vllm:num_preemptions") >= 20
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
    assert len({tuple(answer.tokens[:20]) for answer in alone}) > 10
