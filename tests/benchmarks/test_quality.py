# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark: labels, the table's round trip, and one whole run on a tiny model."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.calibration.tiny import WORDS, build_model, save_model
from vllm_eigen.benchmarks.quality import methods
from vllm_eigen.benchmarks.quality.method_rows import Row, markdown, read_rows, write_rows
from vllm_eigen.benchmarks.quality.method_runs import Variant
from vllm_eigen.benchmarks.quality.streamed_scores import streamed_scorer
from vllm_eigen.calibration.evaluation.scoring import Continuation, transformers_scorer
from vllm_eigen.calibration.methods.base import RankRule
from vllm_eigen.calibration.model.activations import after_layers
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.common.errors import UsageError


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    methods.add_arguments(parser)
    return methods.run(parser.parse_args(arguments))


def test_labels_name_method_group_and_key_cache() -> None:
    assert Variant.parse("paper") == Variant("paper", "paper", 1, False)
    assert Variant.parse("x:no-refit") == Variant("x:no-refit", "x", 1, False, refit=False)
    assert Variant.parse("x:2:post-rope") == Variant("x:2:post-rope", "x", 2, True)
    chosen = Variant.parse("paper:global:refit")
    assert (chosen.refit, chosen.rank_rule) == (True, RankRule.GLOBAL)
    with pytest.raises(UsageError, match="'globl' is unknown"):
        Variant.parse("paper:globl")


def test_rows_survive_the_csv_and_reach_the_table(tmp_path: Path) -> None:
    row = Row(
        "m",
        "paper",
        8,
        16,
        0.5,
        0.5,
        2.0,
        2.2,
        10.0,
        0.5,
        0.01,
        91.0,
        99,
        "1 2",
        "3 4",
        16,
        0.002,
        1.5,
        30.0,
        41.2,
        -0.8,
        1.1,
        500,
    )
    write_rows(tmp_path / "t.csv", [row])
    assert read_rows(tmp_path / "t.csv") == [row]
    assert read_rows(tmp_path / "none.csv") == []
    line = "| paper | 8 x 16 | +10.00 ± 0.50 | 0.01000 ± 0.00200 | 91.00 ± 1.50 | 41.2 (-0.8 ± 1.1)"
    assert f"{line} | 30 |" in markdown([row])
    assert "| 91.00 ± 1.50 | - | 30 |" in markdown([replace(row, questions=0)])


def test_streamed_scores_are_those_of_the_whole_model(tmp_path: Path) -> None:
    model = build_model("llama")
    source = open_source(save_model(model, tmp_path / "model"))
    draw = torch.Generator().manual_seed(0)
    asked = [
        Continuation(torch.randint(3, 60, (length,), generator=draw).tolist(), count)
        for length, count in ((9, 3), (4, 1), (12, 12), (2, 5), (7, 2))
    ]
    layerwise = LayerwiseModel(source, torch.device("cpu"))
    found = streamed_scorer(layerwise, lambda tokens: after_layers(layerwise, tokens))(asked)
    for (score, greedy), (expected, same) in zip(
        found, transformers_scorer(model)(asked), strict=True
    ):
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == same


def test_one_command_makes_table_plot_and_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EIGEN_CACHE", str(tmp_path / "cache"))
    model = save_model(build_model("llama"), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join([" ".join(WORDS)] * 12), encoding="utf-8")
    table = tmp_path / "results" / "quality.csv"
    arguments = ["--models", str(model), "--text", str(text), "--test", str(text)]
    arguments += ["--seq-len", "32", "--samples", "8", "--ratios", "0.75", "0.5"]
    arguments += ["--csv", str(table), "--device", "cpu"]
    labels = ["paper", "sensitivity", "sensitivity:2", "sensitivity:post-rope"]
    labels += ["sensitivity:no-refit", "coded", "coded:post-rope", "paper:global:refit"]
    questions = tmp_path / "q.jsonl"
    asked = [{"ctx": word, "choices": WORDS[:3], "gold": i % 3} for i, word in enumerate(WORDS)]
    questions.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    arguments += ["--questions", str(questions), "--limit", "6"]
    assert run([*arguments, "--methods", *labels]) == 0
    rows = read_rows(table)
    assert [(row.method, row.kv_ratio) for row in rows if row.method != "paper"] == [
        (method, ratio) for method in labels[1:] for ratio in (0.75, 0.5)
    ]
    for row in rows:
        assert row.questions == 6
        assert 0 <= row.zero_shot <= 100
        if row.method.startswith("coded"):  # the ratio is a limit, 8 bits the most
            assert 0.4 <= row.reached <= row.kv_ratio
        elif row.method != "paper":
            assert row.reached == pytest.approx(row.kv_ratio, abs=0.005)
        assert row.kl >= 0
    assert json.loads(table.with_suffix(".json").read_text())[0]["models"] == ["model"]
    assert table.with_suffix(".png").stat().st_size > 1000
    global_rows = [row for row in rows if row.method == "paper:global:refit"]
    assert [row.rank_k for row in rows if row.method == "paper"] != [
        row.rank_k for row in global_rows
    ]
    assert run([*arguments, "--methods", "coded:global"]) == 1  # bits know no rule of ranks
    # A second run of one method replaces its rows and keeps the others.
    assert run([*arguments, "--methods", "sensitivity"]) == 0
    assert len(read_rows(table)) == len(rows)
