"""Every family in every key mode through the engine, against transformers in plain PyTorch.

A row (`rows.py`) gives one engine with small pages, chunks and pool, pushed through prefill, prefix
hits and preemption, and one that stores fp8; `test_compiled.py` and `test_two_ranks.py` have the
other columns. Each logit is compared with `calibration.unfold`'s model of the same checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from calibration.evaluate import load_with_fp8_cache
from calibration.unfold import load_reference
from tests.engine.conftest import Rows
from tests.engine.harness import (
    LOGIT_LIMIT,
    ask,
    cached_elements,
    check,
    engine,
    expected_logits,
    metric,
    relative_error,
)
from tests.engine.rows import MAX_MODEL_LEN, ROWS, Row
from tests.engine.two_ranks import word_prompts

CHUNK = 48
BLOCK = 16
BLOCKS = 40
FP8_LIMIT = 5e-3
"""A latent next to the middle of two fp8 values may be rounded to the other one."""


@pytest.fixture(scope="module", params=ROWS, ids=str)
def pair(request: pytest.FixtureRequest, served: Rows) -> Iterator[tuple[Any, Any]]:
    """A row's engine with little room, and its reference."""
    found = served(request.param)
    with engine(
        found.model,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_memory_bytes=BLOCKS * BLOCK * cached_elements(found.eigen) * 4,
        block_size=BLOCK,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        enable_prefix_caching=True,
        **found.options,
    ) as llm:
        yield llm, load_reference(found.eigen)


def test_prefill(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    for prompt in word_prompts([1, 2, 15, 16, 17, CHUNK - 1], seed=2):
        check(model, [prompt], ask(llm, [prompt], 1, logits=True))


def test_chunked_prefill(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    asked = word_prompts([CHUNK + 1, 3 * CHUNK, 250, 5], seed=3)
    check(model, asked, ask(llm, asked, 2, logits=True))


def test_decode(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    asked = word_prompts([1, 33, 47], seed=4)
    check(model, asked, ask(llm, asked, 20, logits=True))


def test_prefix_hit(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    [prompt] = word_prompts([200], seed=5)
    ask(llm, [prompt], 1, logits=False)
    asked = [prompt, [*prompt[:160], *word_prompts([25], seed=6)[0]]]
    answers = ask(llm, asked, 4, logits=True)
    assert answers[0].cached == 192
    windowed = llm.llm_engine.model_config.get_sliding_window()
    assert answers[1].cached == 160 or windowed, "blocks behind a window may be gone"
    check(model, asked, answers)


def test_preemption(pair: tuple[Any, Any]) -> None:
    llm, model = pair
    asked = word_prompts([120] * 6, seed=7)
    before = metric(llm, "vllm:num_preemptions")
    answers = ask(llm, asked, 40, logits=True)
    assert metric(llm, "vllm:num_preemptions") > before, "the pool was meant to overflow"
    check(model, asked, answers)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_fp8(row: Row, served: Rows) -> None:
    found = served(row)
    asked = word_prompts([3, 100], seed=8)
    with engine(
        found.model, max_model_len=MAX_MODEL_LEN, kv_cache_dtype="fp8", **found.options
    ) as llm:
        answers = ask(llm, asked, 4, logits=True)
    check(load_with_fp8_cache(found.eigen), asked, answers, FP8_LIMIT)
    exact = expected_logits(load_reference(found.eigen), asked[1], answers[1].tokens)
    assert relative_error(answers[1].logits, exact) > LOGIT_LIMIT, "nothing was rounded"
