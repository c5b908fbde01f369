# SPDX-License-Identifier: Apache-2.0
"""Retrieval in long texts: the texts hold what is asked for, and only right answers count."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import small_llama
from vllm_eigen import cli
from vllm_eigen.benchmarks.quality.haystack import (
    HOPS,
    NAMES,
    SEVERAL,
    TASKS,
    Haystack,
    Question,
    haystacks,
)
from vllm_eigen.benchmarks.quality.needle import _rows, ask, over_lengths
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.common.errors import InputError

TEXT = "\n".join(
    f"Line {n} of a long text, {'with words that say very little, ' * 3}and ends."
    for n in range(400)
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_source(str(small_llama.write(tmp_path_factory.mktemp("needle") / "m"))).tokenizer()


@settings(deadline=None, max_examples=20)
@given(length=st.integers(2500, 5000), keys=st.integers(4, 8), seed=st.integers(0, 9))
def test_texts_have_their_length_and_every_fact_once(
    tokenizer: Any, length: int, keys: int, seed: int
) -> None:
    [made] = haystacks(tokenizer, TEXT, length=length, keys=keys, number=1, seed=seed)
    assert len(made.tokens) + max(len(item.tokens) for item in made.questions) == length
    text = tokenizer.decode(made.tokens)
    asked = {task: [item for item in made.questions if item.task == task] for task in TASKS}
    assert [len(asked[task]) for task in TASKS] == [keys, keys // SEVERAL, 2, 1]
    for task, questions in asked.items():
        for question in questions:
            said = tokenizer.decode(question.tokens)
            names = [name for name in NAMES if re.search(rf"\b{name}\b", said)]
            if task == "variable tracking":
                number = re.findall(r"[0-9]+", said)[-1]
                chain = [f"VAR {question.expected[0]} = {number}."]
                chain += [f"VAR {new} = VAR {old}." for old, new in pairwise(question.expected)]
                places = [text.index(link) for link in chain]
                assert places == sorted(places)
            elif task == "multi-value":
                [name] = names
                for value in question.expected:
                    assert text.count(f"One of the parcel numbers of {name} is {value}.") == 1
            else:
                codes = re.findall(r"The door code of (\w+) is (\d+)\.", text)
                assert sorted(code for name, code in codes if name in names) == sorted(
                    question.expected
                )
    assert len(made.depths) == keys + 2 * SEVERAL + HOPS + 1
    assert list(made.depths) == sorted(made.depths)
    assert made.depths[0] < 0.1
    assert all(depth < 1 for depth in made.depths)


def test_texts_differ_and_end_with_their_source(tokenizer: Any) -> None:
    first, second = haystacks(tokenizer, TEXT, length=2500, keys=4, number=2, seed=0)
    assert first.tokens != second.tokens
    with pytest.raises(InputError, match="too short for 500 haystacks"):
        haystacks(tokenizer, TEXT, length=2500, keys=4, number=500, seed=0)


class Client:
    """Answers each question with what it was told to say."""

    def __init__(self, said: dict[tuple[int, ...], str]) -> None:
        self.said = said
        self.completions = self

    def create(self, *, prompt: list[int], **_: Any) -> Any:
        return SimpleNamespace(choices=[SimpleNamespace(text=self.said[tuple(prompt)])])


def test_a_score_is_the_share_of_the_strings_found() -> None:
    expected = [("11111",), ("22222",), ("33333", "44444", "55555", "66666")]
    questions = tuple(
        Question("multi-key", (index + 3,), strings) for index, strings in enumerate(expected)
    )
    said = {(1, 2, 3): " 11111.", (1, 2, 4): " 2222", (1, 2, 5): " 44444, 33333 and 12345"}
    assert ask(Client(said), "any", Haystack((1, 2), questions, (0.1,))) == [1.0, 0.0, 0.5]


def test_rows_compare_with_the_first_server() -> None:
    place = (64, "multi-key")
    one, other = [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]
    rows = _rows({"base": (1.0, {place: one}), "coded": (0.25, {place: other})})
    assert [row["found"] for row in rows] == [75.0, 50.0]
    assert (rows[0]["change"], rows[0]["change_error"]) == (0.0, 0.0)
    # Differences 0, -1, 0, 0: mean -0.25, standard deviation 0.5, two standard errors 0.5.
    assert (rows[1]["change"], rows[1]["change_error"]) == (-25.0, pytest.approx(50.0))


def test_lengths_are_pooled_with_equal_weights() -> None:
    scores = {(64, "multi-key"): [1.0, 0.0, 1.0, 1.0], (128, "multi-key"): [0.0, 1.0, 0.0, 0.0]}
    [row] = over_lengths(_rows({"base": (1.0, scores)}))
    assert (row["length"], row["questions"], row["found"]) == (None, 8, 50.0)
    # Both have a standard deviation of 0.5, two standard errors of 50 points.
    assert row["found_error"] == pytest.approx(50 / 2**0.5)


def test_a_text_that_is_no_text(tmp_path: Path) -> None:
    from vllm_eigen import cli

    base = small_llama.write(tmp_path / "m")
    command = ["bench", "needle", "--base", str(base), "--eigen", str(base), "--text"]
    command += [
        str(tmp_path / "none.txt"),
        "--lengths",
        "64",
        "--output-json",
        str(tmp_path / "r.json"),
    ]
    assert cli.main(command) != 0
    assert list(tmp_path.glob("r*")) == []


def test_a_text_that_leaves_no_room_for_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = small_llama.write(tmp_path / "m")
    most = open_source(str(base)).max_positions
    command = ["bench", "needle", "--base", str(base), "--eigen", str(base), "--text", "none.txt"]
    options = ["--lengths", str(most - 1), "--output-json", str(tmp_path / "r.json")]
    assert cli.main([*command, *options]) == 2
    assert "and an answer" in capsys.readouterr().err


def test_checkpoints_of_one_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [str(tmp_path / folder / "eigen") for folder in ("a", "b")]
    text, output = str(tmp_path / "text"), str(tmp_path / "out.json")
    options = ["--text", text, "--output-json", output]
    assert cli.main(["bench", "needle", "--base", "base", "--eigen", *same, *options]) == 2
    assert "same folder name" in capsys.readouterr().err
