# SPDX-License-Identifier: Apache-2.0
"""Every family in every key mode through the engine, against transformers in plain PyTorch.

A row (`rows.py`) gives one engine with small blocks, chunks and pool, pushed through prefill,
prefix hits and preemption, and one that stores fp8; `test_compiled.py` and `test_two_ranks.py` have
the other columns. Each logit is compared with that of `calibration.model.compressed` for the same
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.plugin.conftest import Rows
from tests.plugin.harness import scenarios
from tests.plugin.harness.engine import (
    LOGIT_LIMIT,
    ask,
    check,
    engine,
    expected_logits,
    relative_error,
)
from tests.plugin.harness.rows import MAX_MODEL_LEN, ROWS, Row
from tests.plugin.harness.two_ranks import word_prompts
from vllm_eigen.calibration.export.scales import fp8_cache
from vllm_eigen.calibration.model.compressed import load_reference

FP8_LIMIT = 5e-3
"""A latent next to the middle of two fp8 values may be rounded to the other one."""


@pytest.fixture(scope="module", params=ROWS, ids=str)
def pair(request: pytest.FixtureRequest, served: Rows) -> Iterator[tuple[Any, Any]]:
    """A row's engine with little room, and its reference."""
    with scenarios.small_engine(served(request.param)) as found:
        yield found


def test_prefill(pair: tuple[Any, Any]) -> None:
    scenarios.prefill(*pair)


def test_chunked_prefill(pair: tuple[Any, Any]) -> None:
    scenarios.chunked_prefill(*pair)


def test_decode(pair: tuple[Any, Any]) -> None:
    scenarios.decode(*pair)


def test_prefix_hit(pair: tuple[Any, Any]) -> None:
    scenarios.prefix_hit(*pair)


def test_preemption(pair: tuple[Any, Any]) -> None:
    scenarios.preemption(*pair)


# Layers that are kept round as vLLM does, which the reference does not.
@pytest.mark.parametrize("row", [row for row in ROWS if row.kind != "gemma3_text"], ids=str)
def test_fp8(row: Row, served: Rows) -> None:
    found = served(row)
    asked = word_prompts([3, 100], seed=8)
    with engine(
        found.model, max_model_len=MAX_MODEL_LEN, kv_cache_dtype="fp8", **found.options
    ) as llm:
        answers = ask(llm, asked, 4, logits=True)
    check(load_reference(found.eigen, cache=fp8_cache), asked, answers, FP8_LIMIT)
    exact = expected_logits(load_reference(found.eigen), asked[1], answers[1].tokens)
    assert relative_error(answers[1].logits, exact) > LOGIT_LIMIT, "nothing was rounded"
