# SPDX-License-Identifier: Apache-2.0
"""Reduced rank: vLLM's logits against transformers running the same compressed model.

One engine a family, of real size and with a small chunk, is pushed through prefill and decode;
every logit it gives is compared with `vllm_eigen.calibration.model.compressed`, an ordinary model
of the base architecture with the same output. Small blocks and pools are `test_matrix.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.plugin.conftest import FAMILIES, Models
from tests.plugin.harness.engine import ask, check, engine, prompts
from vllm_eigen.calibration.model.compressed import load_reference

CHUNK = 96
BLOCK = 32


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, models: Models) -> Iterator[tuple[Any, Any]]:
    """An engine with small chunks, and its reference in torch."""
    folder = models(request.param, "float32", 0.6)
    with engine(
        folder, block_size=BLOCK, max_model_len=1024, max_num_batched_tokens=CHUNK, max_num_seqs=16
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
