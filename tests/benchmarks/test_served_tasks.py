# SPDX-License-Identifier: Apache-2.0
"""Scores through lm_eval's API client against the offline evaluation, without an engine.

The server is a fake whose log-probabilities come from transformers, so both ways must agree to the
question; and one whose answers are off must be found.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.run import TASK
from tests import small_llama
from tests.benchmarks.fake_server import Fake, serving
from vllm_eigen.benchmarks.lib.endpoint import Endpoint
from vllm_eigen.benchmarks.quality.served_scores import ask_offline, ask_server, compare, write_task
from vllm_eigen.calibration.evaluation.questions import Accuracy
from vllm_eigen.common.errors import EngineError, InputError
from vllm_eigen.common.progress import Reporter

COUNT = 20


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    lines = TASK.read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path / "some.jsonl"
    path.write_text("".join(lines[:COUNT]), encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return small_llama.write(tmp_path / "model")


def test_served_scores_are_the_offline_ones(asked: Path, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def likelihoods(tokens: list[int]) -> list[float]:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        return [float(row[token]) for row, token in zip(logits, tokens[1:], strict=True)]

    task = write_task(asked, tmp_path)
    with Reporter(quiet=True) as reporter:
        offline = ask_offline(str(base), None, task, tmp_path, None, reporter)["base"]
    with serving(Fake(slots=8, delay=0.0, likelihoods=likelihoods)) as fake:
        served = ask_server(Endpoint(fake.url), str(base), task, tmp_path, None)
    assert offline.questions == COUNT
    assert 0 < served["acc"] < 100
    rows = compare({"base": served}, {"base": offline})
    assert [row.gap for row in rows] == pytest.approx([0, 0])


def test_gaps_are_in_points() -> None:
    rows = compare(
        {"base": {"acc": 51.0, "acc_norm": 40.0}}, {"base": Accuracy(0.50, 0.40, questions=100)}
    )
    assert [(row.metric, round(row.gap, 6)) for row in rows] == [("acc", 1.0), ("acc_norm", 0.0)]


def test_no_questions_and_a_dead_server(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_task(tmp_path / "none.jsonl", tmp_path)
    with pytest.raises(EngineError, match="no server answers"):
        ask_server(Endpoint("http://127.0.0.1:9"), "no-model", "x", tmp_path, None)
