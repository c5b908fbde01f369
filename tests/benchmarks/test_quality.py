# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark: labels, the table's round trip, and one whole run on a tiny model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tests.calibration.tiny import WORDS, build_model, save_model
from vllm_eigen.benchmarks.quality import methods
from vllm_eigen.benchmarks.quality.method_rows import Row, markdown, read_rows, write_rows
from vllm_eigen.benchmarks.quality.method_runs import Variant


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    methods.add_arguments(parser)
    return methods.run(parser.parse_args(arguments))


def test_labels_name_method_group_and_key_cache() -> None:
    assert Variant.parse("paper") == Variant("paper", "paper", 1, False)
    assert Variant.parse("x:no-refit") == Variant("x:no-refit", "x", 1, False, True)
    assert Variant.parse("x:2:post-rope") == Variant("x:2:post-rope", "x", 2, True)


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
    )
    write_rows(tmp_path / "t.csv", [row])
    assert read_rows(tmp_path / "t.csv") == [row]
    assert read_rows(tmp_path / "none.csv") == []
    assert "| paper | 8 x 16 | +10.00 ± 0.50 | 0.01000 ± 0.00200 | 91.00 ± 1.50 | 30 |" in markdown(
        [row]
    )


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
    labels += ["sensitivity:no-refit", "coded", "coded:post-rope"]
    assert run([*arguments, "--methods", *labels]) == 0
    rows = read_rows(table)
    assert [(row.method, row.kv_ratio) for row in rows if row.method != "paper"] == [
        (method, ratio) for method in labels[1:] for ratio in (0.75, 0.5)
    ]
    for row in rows:
        if row.method.startswith("coded"):  # the ratio is a limit, 8 bits the most
            assert 0.4 <= row.reached <= row.kv_ratio
        elif row.method != "paper":
            assert row.reached == pytest.approx(row.kv_ratio, abs=0.005)
        assert row.kl >= 0
    assert json.loads(table.with_suffix(".json").read_text())[0]["models"] == ["model"]
    assert table.with_suffix(".png").stat().st_size > 1000
    # A second run of one method replaces its rows and keeps the others.
    assert run([*arguments, "--methods", "sensitivity"]) == 0
    assert len(read_rows(table)) == len(rows)
