"""Scores through lm_eval's API client against the offline evaluation, without an engine.

The server is a fake whose log-probabilities come from transformers, so both ways must agree to the
question; and one whose answers are off must be found.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.served_tasks import ask_offline, ask_server, compare, write_task
from benchmarks.serving.endpoint import Endpoint
from calibration.progress import Reporter
from calibration.tasks import Accuracy
from demo import questions
from tests.benchmarks.fake_server import Fake, serving
from vllm_eigen.errors import EngineError, InputError

MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
COUNT = 20


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    path = tmp_path / "ends.jsonl"
    assert questions.write(path, COUNT, ("stdlib",)) == COUNT
    return path


def test_questions_have_one_right_choice(asked: Path) -> None:
    for line in asked.read_text().splitlines():
        item = json.loads(line)
        assert len(set(item["choices"])) == questions.CHOICES
        assert 0 <= item["gold"] < questions.CHOICES
    assert len({json.loads(line)["gold"] for line in asked.read_text().splitlines()}) > 1


def test_served_scores_are_the_offline_ones(asked: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    def likelihoods(tokens: list[int]) -> list[float]:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        return [float(row[token]) for row, token in zip(logits, tokens[1:], strict=True)]

    task = write_task(asked, tmp_path)
    with Reporter(quiet=True) as reporter:
        offline = ask_offline(str(MODEL), None, task, tmp_path, None, reporter)["base"]
    with serving(Fake(slots=8, delay=0.0, likelihoods=likelihoods)) as fake:
        served = ask_server(Endpoint(fake.url), str(MODEL), task, tmp_path, None)
    assert offline.questions == COUNT
    assert 25 < served["acc"] < 100  # the model knows something, and the task is not trivial
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
        ask_server(Endpoint("http://127.0.0.1:9"), str(MODEL), "x", tmp_path, None)
