"""The engine around the kernels: capacity, compiled graphs, and the plain PyTorch back end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from calibration.unfold import load_reference
from tests.engine.conftest import Models
from tests.engine.harness import (
    MAX_MODEL_LEN,
    POOL_BYTES,
    ask,
    cached_elements,
    engine,
    expected_logits,
    prompts,
    relative_error,
)
from vllm_eigen.backend import KERNELS_VARIABLE

LIMIT = 1e-4


@pytest.mark.skipif(
    any(" " in place for place in (sys.prefix, str(Path.home()))),
    reason="torch's compiler cannot work below a path with spaces",
)
def test_compiled_logits_and_capacity(models: Models) -> None:
    folder = models("llama", "float32", 0.6)
    model = load_reference(folder)
    asked = prompts([1, 40, 300], seed=7)
    with engine(folder, enforce_eager=False) as llm:
        answers = ask(llm, asked, 4, logits=True)
        config = llm.llm_engine.vllm_config.cache_config
        tokens = config.num_gpu_blocks * config.block_size
    for prompt, answer in zip(asked, answers, strict=True):
        assert relative_error(answer.logits, expected_logits(model, prompt, answer.tokens)) < LIMIT
    possible = POOL_BYTES / (cached_elements(folder) * 4)
    assert tokens == pytest.approx(possible, rel=0.02)
    assert tokens > MAX_MODEL_LEN


def test_plain_pytorch_kernels(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    folder = models("llama", "float32", 0.6)
    model = load_reference(folder)
    asked = prompts([3, 200], seed=8)
    with engine(folder) as llm:
        answers = ask(llm, asked, 4, logits=True)
    for prompt, answer in zip(asked, answers, strict=True):
        assert relative_error(answer.logits, expected_logits(model, prompt, answer.tokens)) < LIMIT
