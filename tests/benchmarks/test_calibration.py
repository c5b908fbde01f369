# SPDX-License-Identifier: Apache-2.0
"""The benchmark of calibration: rows of both tables, on sizes that take seconds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tests.calibration.tiny import WORDS, build_model, save_model
from vllm_eigen.benchmarks.calibration import command, cost
from vllm_eigen.benchmarks.calibration import samples as windows
from vllm_eigen.benchmarks.calibration.cost import CostRow
from vllm_eigen.benchmarks.calibration.tables import markdown
from vllm_eigen.common.errors import InputError


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


@pytest.mark.slow
def test_one_command_makes_tables_plot_and_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EIGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(windows, "SAMPLES", (2, 4))
    monkeypatch.setattr(cost, "LAYERS", (1, 2))
    monkeypatch.setattr(cost, "WIDTHS", (128, 128))
    monkeypatch.setattr(cost, "SAMPLES", (2, 2))
    model = save_model(build_model("llama", hidden_size=64), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join([" ".join(WORDS)] * 12), encoding="utf-8")
    output = tmp_path / "results" / "calibration.json"
    arguments = ["--models", str(model), "--text", str(text), "--test", str(text)]
    assert run([*arguments, "--seq-len", "32", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    rows = record["samples"]
    assert [(row["method"], row["samples"]) for row in rows] == [
        ("paper", 2), ("paper", 4), ("coded", 2), ("coded", 4)
    ]  # fmt: skip
    assert all(row["kl"] > 0 for row in rows)
    assert [row["kv_ratio"] for row in rows[:2]] == pytest.approx([0.6] * 2, abs=0.02)
    # Codes of heads as small as these come in large steps.
    assert all(0.2 < row["kv_ratio"] <= 0.27 for row in rows[2:])
    costs = record["costs"]
    assert [(row["varies"], row["layers"]) for row in costs] == [
        ("layers", 1), ("layers", 2), *[("width", 2)] * 2, *[("samples", 2)] * 2
    ]  # fmt: skip
    for row in costs:
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 100e6  # torch alone takes more
        assert row["model_bytes"] == row["layers"] * row["layer_bytes"]
    assert str(tmp_path) not in output.read_text()
    assert "| model | coded | 32 | 4 |" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_a_fit_says_how_far_off_it_is() -> None:
    def row(layers: int, seconds: float) -> CostRow:
        return CostRow("layers", layers, 8, 8, 1, layers, seconds, 1)

    line = markdown([], [row(4, 7.0), row(8, 11.0), row(16, 19.0)])
    assert "- by layers: 3.0 s + 1.00 s x layers, off by 0% at most" in line
    bent = markdown([], [row(4, 4.0), row(8, 16.0), row(16, 64.0)])
    assert "-20.0 s + 5.14 s x layers, off by 86% at most" in bent
    assert "fitted" not in markdown([], [row(4, 7.0), row(8, 11.0)])


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    arguments = ["--models", str(tmp_path / "none"), "--no-cost", "--output", str(output)]
    with pytest.raises(InputError, match="neither a folder nor a model"):
        run(arguments)
    assert not output.exists()
