# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice scoring against a plain computation, and the command's use of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_eigen.calibration.evaluation.questions import accuracy, read_questions
from vllm_eigen.calibration.evaluation.scoring import transformers_scorer
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.model.transformers_model import load_base
from vllm_eigen.common.errors import InputError

Command = Callable[..., tuple[int, str, str]]
QUESTIONS = [
    {"ctx": "w1 w2 w3", "choices": ["w4 w5", "w6", "w7 w8 w9"], "gold": 1},
    {"ctx": "w9 w8", "choices": ["w1", "w2"], "gold": 0},
    {"ctx": "w1 _ w5 w6", "choices": ["w2", "w3"], "gold": 1},
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    return path


def test_scores_are_sums_of_log_probabilities(make_model: Callable[..., Path], task: Path) -> None:
    source = open_source(str(make_model()))
    model, tokenizer = load_base(source), source.tokenizer()
    # What counts is scored: the continuation's tokens, or those behind the blank.
    right = 0
    for question, counted in zip(QUESTIONS, ([2, 1, 3], [1, 1], [2, 2]), strict=True):
        scores = []
        for choice, count in zip(question["choices"], counted, strict=True):
            context = str(question["ctx"])
            text = context.replace("_", choice) if "_" in context else f"{context} {choice}"
            tokens = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                found = model(tokens).logits[0, :-1].log_softmax(-1)
            found = found.gather(-1, tokens[0, 1:, None])[:, 0]
            scores.append(float(found[-count:].sum()))
        right += scores.index(max(scores)) == question["gold"]
    result = accuracy(transformers_scorer(model), tokenizer, read_questions(task), length=64)
    assert result.questions == 3
    assert result.acc == pytest.approx(right / 3)


def test_command(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command, task: Path
) -> None:
    output = tmp_path / "out"
    arguments = ("--kv-ratio", 1, "--text", text_file, "--seq-len", 24)
    assert command("calibrate", make_model(), "--output", output, *arguments)[0] == 0
    status, out, error = command("evaluate", output, "--text", text_file, "--json", "--tasks", task)
    assert status == 0, error
    scores = json.loads(out)["tasks"]["task"]
    assert scores["base"] == scores["eigen"]
    assert scores["base"]["questions"] == 3


def test_bad_files(tmp_path: Path) -> None:
    for content in ("", '{"ctx": "a"}', "[]", '{"ctx": "a", "choices": ["b"], "gold": 3}'):
        path = tmp_path / "bad.jsonl"
        path.write_text(content)
        with pytest.raises(InputError, match=r"bad\.jsonl"):
            read_questions(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
