"""Reduced rank: vLLM's logits against transformers running the same compressed model.

One small engine a family is pushed through prefill in chunks, decode, prefix-cache hits and
preemption; every logit it gives is compared with `calibration.unfold`, an ordinary model of the
base architecture with the same output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from calibration.unfold import load_reference
from tests.engine.conftest import FAMILIES, Models
from tests.engine.harness import (
    ask,
    cached_elements,
    check,
    engine,
    metric,
    prompts,
)

CHUNK = 96
BLOCK = 32
BLOCKS = 64


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, models: Models) -> Iterator[tuple[Any, Any]]:
    """An engine with a small pool and small chunks, and its reference in torch."""
    folder = models(request.param, "float32", 0.6)
    pool = BLOCKS * BLOCK * cached_elements(folder) * 4
    with engine(
        folder,
        kv_cache_memory_bytes=pool,
        block_size=BLOCK,
        max_model_len=1024,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=16,
        enable_prefix_caching=True,
    ) as llm:
        yield llm, load_reference(folder)


def test_prefill_in_one_step_and_decode(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    asked = prompts([1, 2, 31, 32, 33, CHUNK - 1], seed=2)
    for prompt in asked:
        check(model, [prompt], ask(llm, [prompt], 4, logits=True))


def test_chunked_prefill_of_unequal_lengths(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    asked = prompts([CHUNK + 1, 3 * CHUNK, 700, 5, 150], seed=3)
    check(model, asked, ask(llm, asked, 6, logits=True))


def test_decode_after_a_prefix_hit(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    [prompt] = prompts([400], seed=4)
    ask(llm, [prompt], 1, logits=False)
    asked = [prompt, [*prompt[:320], *prompts([50], seed=5)[0]]]
    answers = ask(llm, asked, 6, logits=True)
    assert [answer.cached for answer in answers] == [384, 320]
    check(model, asked, answers)


def test_after_preemption(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    asked = prompts([300] * 8, seed=6)
    before = metric(llm, "vllm:num_preemptions")
    answers = ask(llm, asked, 40, logits=True)
    assert metric(llm, "vllm:num_preemptions") > before, "the pool was meant to overflow"
    check(model, asked, answers)
