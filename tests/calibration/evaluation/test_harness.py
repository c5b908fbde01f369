# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness: same scores as the same questions from a file; clear refusals."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.calibration.tiny import WORDS

Command = Callable[..., tuple[int, str, str]]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""
QUESTIONS = 40


@cache
def task_manager(include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


@pytest.fixture(autouse=True)
def _one_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all of lm_eval's task descriptions takes seconds: done once a folder."""
    monkeypatch.setattr("vllm_eigen.calibration.evaluation.harness.TaskManager", task_manager)


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random questions with choices of different length, as a file and as a harness task."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    rng = random.Random(0)
    lines = [
        {
            "ctx": " ".join(rng.choices(WORDS, k=rng.randint(1, 90))),
            "choices": [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(3)],
            "gold": rng.randrange(3),
        }
        for _ in range(QUESTIONS)
    ]
    file = tmp_path / "plain.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    folder = tmp_path / "yaml"
    folder.mkdir()
    for name, kind in (("own_task", "multiple_choice"), ("other_task", "generate_until")):
        text = TASK.format(name=name, file=file, kind=kind)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def checkpoint(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> Path:
    output = tmp_path / "out"
    arguments = ("--kv-ratio", 0.4, "--text", text_file, "--seq-len", 24, "--method", "paper")
    status, _, error = command("calibrate", make_model(), "--output", output, *arguments)
    assert status == 0, error
    return output


@pytest.mark.slow
def test_scores_are_those_of_the_same_questions_in_a_file(
    questions: Path, checkpoint: Path, text_file: Path, command: Command
) -> None:
    tail = ("--text", text_file, "--task-path", questions.parent / "yaml", "--json")
    for limit in ((), ("--limit", 7)):
        asked = ("--tasks", "own_task", questions)
        status, out, error = command("evaluate", checkpoint, *tail, *asked, *limit)
        assert status == 0, error
        tasks = json.loads(out)["tasks"]
        assert tasks["own_task"] == tasks["plain"]
        assert tasks["plain"]["base"]["acc"] != tasks["plain"]["base"]["acc_norm"]
        assert tasks["plain"]["base"]["questions"] == (limit[1] if limit else QUESTIONS)


@pytest.mark.slow
def test_refusals_are_one_line(
    questions: Path, checkpoint: Path, text_file: Path, command: Command, monkeypatch: Any
) -> None:
    def refused(*arguments: Any) -> str:
        status, out, error = command("evaluate", checkpoint, "--text", text_file, *arguments)
        assert status in (1, 2)
        assert out == ""
        assert "Traceback" not in error
        return error.strip().splitlines()[-1]

    folder = ("--include-path", questions.parent / "yaml")
    assert "neither a file nor a task" in refused("--tasks", "no_such_task", *folder)
    assert "generate_until" in refused("--tasks", "other_task", *folder)
    assert "is not a folder" in refused("--tasks", "own_task", "--task-path", questions)
    assert "twice" in refused("--tasks", questions, questions)
    assert "--limit 0" in refused("--tasks", questions, "--task-limit", 0)

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", unreachable)
        assert "cannot be loaded (Couldn't reach the Hub)" in refused("--tasks", "piqa")
    monkeypatch.delitem(sys.modules, "vllm_eigen.calibration.evaluation.harness")
    for name in ("lm_eval", "lm_eval.api.model"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, name, None)
    assert "install vllm-eigen[bench]" in refused("--tasks", "piqa,winogrande")
