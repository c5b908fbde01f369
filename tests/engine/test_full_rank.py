"""At full rank nothing may change: same greedy tokens in float32, same distributions in bf16."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import FAMILIES, Models
from tests.engine.harness import ask, engine, prompts

LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 127, 128, 129, 144, 233, 256, 377, 610, 987, 1500)
KL_LIMIT = 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_the_base_model(models: Models, family: str) -> None:
    asked = prompts(LENGTHS)
    with engine(models(family, "float32", 0)) as llm:
        base = ask(llm, asked, 64, logits=False)
    with engine(models(family, "float32", 1.0)) as llm:
        eigen = ask(llm, asked, 64, logits=False)
    assert [answer.tokens for answer in eigen] == [answer.tokens for answer in base]
    assert len({tuple(answer.tokens) for answer in base}) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_distributions_are_close(models: Models, family: str) -> None:
    asked = prompts(LENGTHS[::2], seed=1)
    with engine(models(family, "bfloat16", 0), "bfloat16") as llm:
        base = ask(llm, asked, 1, logits=True)
    with engine(models(family, "bfloat16", 1.0), "bfloat16") as llm:
        eigen = ask(llm, asked, 1, logits=True)
    p, q = (
        torch.cat([answer.logits for answer in side]).double().log_softmax(-1)
        for side in (base, eigen)
    )
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert float(divergence) < KL_LIMIT
