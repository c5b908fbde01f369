# SPDX-License-Identifier: Apache-2.0
"""At full rank nothing may change: same greedy tokens in float32, same distributions in bf16.

Two full-rank checkpoints each: the one calibration makes, and one with its heads rotated at random,
so that the latents differ from the base model's keys and values and only their products agree.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.plugin.conftest import FAMILIES, Models
from tests.plugin.harness.engine import ask, engine, prompts, rotated

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 127, 128, 129, 144, 233, 256, 377, 610, 987, 1500)
KL_LIMIT = 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_the_base_model(models: Models, family: str, tmp_path: Path) -> None:
    base = models(family, "float32", 0)
    asked = prompts(LENGTHS)
    tokens = []
    for model in (base, models(family, "float32", 1.0), rotated(base, tmp_path / "rotated")):
        with engine(model) as llm:
            tokens.append([answer.tokens for answer in ask(llm, asked, 64, logits=False)])
    assert tokens[1] == tokens[0]
    assert tokens[2] == tokens[0]
    assert len({tuple(answer) for answer in tokens[0]}) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_distributions_are_close(models: Models, family: str, tmp_path: Path) -> None:
    base = models(family, "bfloat16", 0)
    asked = prompts(LENGTHS[::2], seed=1)
    logits = []
    for model in (base, rotated(base, tmp_path / "rotated")):
        with engine(model, "bfloat16") as llm:
            answers = ask(llm, asked, 1, logits=True)
        logits.append(torch.cat([answer.logits for answer in answers]).double().log_softmax(-1))
    divergence = torch.nn.functional.kl_div(
        logits[1], logits[0], log_target=True, reduction="batchmean"
    )
    assert 0 < float(divergence) < KL_LIMIT
