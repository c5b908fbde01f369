# SPDX-License-Identifier: Apache-2.0
"""Weights that are loaded into a running engine are those that it computes with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.harness.engine import ask, engine, expected_logits, prompts, relative_error
from tests.plugin.harness.rows import Row
from vllm_eigen.calibration.model.compressed import load_reference

LIMIT = 1e-4
OPTIONS = {"load_format": "dummy", "enable_prefix_caching": False, "max_model_len": 128}


@pytest.mark.feature("weights loaded again (`reload_weights`), after random ones too")
def test_reloaded_weights_give_the_references_logits(tmp_path: Path) -> None:
    """Reconstructed keys and biases: parameters of ours, packed copies, and a fused projection."""
    served = Row("llama", "reloaded", {"attention_bias": True}).write(tmp_path)
    model = load_reference(served.eigen)
    asked = [[token % 60 + 3 for token in prompt] for prompt in prompts([5, 40], seed=18)]

    def error(llm: object) -> float:
        answers = ask(llm, asked, 4, logits=True)
        pairs = zip(asked, answers, strict=True)
        return max(
            relative_error(answer.logits, expected_logits(model, prompt, answer.tokens))
            for prompt, answer in pairs
        )

    with engine(served.eigen, **OPTIONS) as llm:
        assert error(llm) > 0.1
        llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
        for _ in range(2):
            llm.collective_rpc("reload_weights")
            assert error(llm) < LIMIT
