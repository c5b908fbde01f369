# SPDX-License-Identifier: Apache-2.0
"""Two pipeline stages give the logits of the whole model."""

from __future__ import annotations

import pytest
import torch

from tests.plugin.conftest import Rows
from tests.plugin.harness.engine import expected_logits, relative_error
from tests.plugin.harness.rows import ROWS, Row
from tests.plugin.harness.stages import logits_of_stages
from tests.plugin.harness.two_ranks import word_prompts
from vllm_eigen.calibration.model.compressed import load_reference

SPLIT = [row for row in ROWS if str(row) in ("opt-no-rope", "mpt-no-rope", "qwen3-pre-rope")]


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return word_prompts([70], seed=11)[0]


@pytest.fixture(scope="module")
def logits(
    prompt: list[int], served: Rows, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """What every row gives in two stages."""
    models = {str(row): served(row).model for row in SPLIT}
    return logits_of_stages(models, prompt, tmp_path_factory.mktemp("stages"))


@pytest.mark.feature("pipeline parallel stages")
@pytest.mark.slow
@pytest.mark.parametrize("row", SPLIT, ids=str)
def test_two_pipeline_stages(
    row: Row, prompt: list[int], served: Rows, logits: dict[str, torch.Tensor]
) -> None:
    found = logits[str(row)]
    expected = expected_logits(load_reference(served(row).eigen), prompt[:1], [*prompt[1:], 0])
    assert found.shape[0] == len(prompt)
    assert relative_error(found[:, : expected.shape[1]], expected) < 1e-4
