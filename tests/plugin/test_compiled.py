# SPDX-License-Identifier: Apache-2.0
"""The matrix through torch's compiler, as vLLM serves it, against transformers.

The compiler sees the cache as one operator. A coded row's graph is its plain row's with the biases
that hold offsets, so one coded row of each form is compiled.
"""

from __future__ import annotations

import pytest
from torch._dynamo.utils import counters

from tests.plugin.conftest import Rows
from tests.plugin.harness.engine import ask, check, engine
from tests.plugin.harness.rows import CODED_ROWS, MAX_MODEL_LEN, ROWS, Row, limits
from tests.plugin.harness.two_ranks import word_prompts
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.server.launch.process import can_compile

FORMS = (
    "opt-no-rope-coded",
    "mpt-clipped-coded",
    "llama-pre-rope-coded",
    "llama-post-rope-coded",
    "llama-bases-only-coded",
    "qwen3-post-rope-coded",
    "gemma3_text-pre-rope-coded",
)
GENERATED = (
    "opt-no-rope",
    "llama-pre-rope",
    "llama-bases-only-coded",
    "gemma3_text-pre-rope-coded",
)
"""Rows for which Inductor makes C++ of the graph, by far the longest part; of the others the graph
that the compiler traced runs as it is."""
COMPILED = [*ROWS, *(row for row in CODED_ROWS if str(row) in FORMS)]


def test_every_form_is_a_row() -> None:
    assert len(COMPILED) == len(ROWS) + len(FORMS)
    assert {str(row) for row in COMPILED}.issuperset(GENERATED)


@pytest.mark.skipif(
    not can_compile(),
    reason="torch's compiler cannot work below a path with spaces",
)
@pytest.mark.parametrize("row", COMPILED, ids=str)
@pytest.mark.slow
def test_compiled(row: Row, served: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    if str(row) not in GENERATED:
        monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    found = served(row)
    asked = word_prompts([1, 40, 100], seed=9)
    counters.clear()
    with engine(
        found.model, max_model_len=MAX_MODEL_LEN, enforce_eager=False, **found.options
    ) as llm:
        check(load_reference(found.eigen), asked, ask(llm, asked, 4, logits=True), **limits(row))
    assert counters["stats"]["unique_graphs"] >= 1, "the compiler should have seen the model"
