"""Two pipeline stages give the logits of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.unfold import load_reference
from tests.engine.harness import expected_logits, relative_error
from tests.engine.rows import ROWS, Row
from tests.engine.stages import logits_of_stages
from tests.engine.two_ranks import word_prompts

SPLIT = [row for row in ROWS if str(row) in ("opt-folded", "mpt-folded", "qwen3-pre-rope")]


@pytest.mark.feature("pipeline parallel stages")
@pytest.mark.parametrize("row", SPLIT, ids=str)
def test_two_pipeline_stages(row: Row, tmp_path: Path) -> None:
    found = row.write(tmp_path)
    [prompt] = word_prompts([70], seed=11)
    logits = logits_of_stages(found.model, prompt, tmp_path)
    expected = expected_logits(load_reference(found.eigen), prompt[:1], [*prompt[1:], 0])
    assert logits.shape[0] == len(prompt)
    assert relative_error(logits[:, : expected.shape[1]], expected) < 1e-4
