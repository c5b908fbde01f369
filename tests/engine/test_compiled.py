"""Every row of the matrix through torch's compiler, as vLLM serves it, against transformers."""

from __future__ import annotations

import pytest

from calibration.unfold import load_reference
from server.process import can_compile
from tests.engine.conftest import Rows
from tests.engine.harness import ask, check, engine
from tests.engine.rows import MAX_MODEL_LEN, ROWS, Row
from tests.engine.two_ranks import word_prompts


@pytest.mark.skipif(
    not can_compile(),
    reason="torch's compiler cannot work below a path with spaces",
)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_compiled(row: Row, served: Rows) -> None:
    found = served(row)
    asked = word_prompts([1, 40, 100], seed=9)
    with engine(
        found.model, max_model_len=MAX_MODEL_LEN, enforce_eager=False, **found.options
    ) as llm:
        check(load_reference(found.eigen), asked, ask(llm, asked, 4, logits=True))
