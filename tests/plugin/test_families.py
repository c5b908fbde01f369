# SPDX-License-Identifier: Apache-2.0
"""Families beside those of the matrix: one engine pushed through everything, one at full rank.

What does not depend on the family is proven by `test_matrix.py` and `test_coded.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.calibration import tiny
from tests.plugin.conftest import Rows
from tests.plugin.harness import scenarios
from tests.plugin.harness.engine import ask, check, engine, expected_logits, rotated
from tests.plugin.harness.rows import FAMILY_ROWS, MACHINE_LIMITS, MAX_MODEL_LEN, CodedRow
from tests.plugin.harness.two_ranks import word_prompts
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.model.transformers_model import load_base
from vllm_eigen.checkpoint import families

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def leave_transformers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM wraps classes of transformers for its compiler, for good; the reference needs them."""
    monkeypatch.setattr(
        "vllm.model_executor.models.transformers.base.Base._decorate_for_torch_compile",
        lambda model: None,
    )


@pytest.mark.parametrize("row", FAMILY_ROWS, ids=str)
def test_coded_family(row: CodedRow, served: Rows) -> None:
    # Layers with windows free their blocks.
    blocks = 28 if row.kind == "gemma2" else scenarios.BLOCKS
    with scenarios.small_engine(served(row), blocks) as found:
        for scenario in (
            scenarios.prefill,
            scenarios.chunked_prefill,
            scenarios.decode,
            scenarios.prefix_hit,
            scenarios.preemption,
        ):
            scenario(*found, **MACHINE_LIMITS)


@pytest.mark.parametrize("row", {row.kind: row for row in reversed(FAMILY_ROWS)}.values(), ids=str)
def test_full_rank_gives_the_tokens_of_the_base(
    row: CodedRow, served: Rows, tmp_path: Path
) -> None:
    base = served(row).base
    asked = word_prompts([1, 17, 200], seed=10)
    model = rotated(base, tmp_path / "rotated")
    with engine(model, max_model_len=MAX_MODEL_LEN, **row.engine) as llm:
        answers = ask(llm, asked, 24, logits=True)
    reference = load_base(open_source(str(base)))
    check(reference, asked, answers)
    for prompt, answer in zip(asked, answers, strict=True):
        expected = expected_logits(reference, prompt, answer.tokens)
        assert expected.argmax(-1).tolist() == answer.tokens
    assert len({tuple(answer.tokens) for answer in answers}) == len(asked)


def test_the_guide_s_family_needs_no_more_than_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_eigen.plugin import models, register

    guide = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(replace\(.*?)```", guide, re.DOTALL)
    assert len(block.splitlines()) <= 25
    row: Any = eval(block, {"replace": replace, "_LLAMA": families.FAMILIES[0]})
    assert row not in families.FAMILIES
    for module in (families, models, register):
        monkeypatch.setattr(module, "FAMILIES", (*families.FAMILIES, row))
    register.register()
    kind = row.model_type
    monkeypatch.setitem(tiny.MAKERS, kind, {**tiny.MAKERS["llama"], "model_type": kind})
    made = CodedRow(kind, "guide", {"num_hidden_layers": 1}, exact=False)
    with scenarios.small_engine(made.write(tmp_path)) as found:
        scenarios.chunked_prefill(*found, **MACHINE_LIMITS)
        scenarios.decode(*found, **MACHINE_LIMITS)
