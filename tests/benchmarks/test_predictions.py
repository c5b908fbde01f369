# SPDX-License-Identifier: Apache-2.0
"""The benchmark of predictions: rows of runs and of what is extrapolated from them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from vllm_eigen.benchmarks.calibration import predictions
from vllm_eigen.benchmarks.calibration.predictions import PredictionRow, extrapolate, markdown

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1002,
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 6,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "dtype": "bfloat16",
}  # fmt: skip


def row(layers: int, seconds: float, peak: int) -> PredictionRow:
    return PredictionRow("m", layers, True, seconds, 20.0, peak, 3 << 20)


def test_the_whole_model_is_on_the_line_through_the_runs() -> None:
    assert extrapolate([row(2, 10.0, 100), row(4, 14.0, 120)], 32) == (70.0, 400)


def test_the_table_says_what_was_not_run() -> None:
    rows = [row(2, 10.0, 4 << 20), PredictionRow("m", 32, False, 40.0, 50.0, 1 << 20, 1 << 20)]
    table = markdown(rows, 8, 16)
    assert "8 windows of 16 tokens" in table
    assert "| m | 2 | run | 10 | 20 | 2.00 | 4 | 3 | 0.75 |" in table
    assert "| m | 32 | extrapolated | 40 | 50 | 1.25 | 1 | 1 | 1.00 |" in table


@pytest.mark.slow
def test_a_shape_is_run_with_few_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "SHAPES", {"tiny": TINY})
    parser = argparse.ArgumentParser()
    predictions.add_arguments(parser)
    output = tmp_path / "p.json"
    arguments = ["--shapes", "tiny", "--layers", "1", "2", "--samples", "2", "--seq-len", "16"]
    assert predictions.run(parser.parse_args([*arguments, "--output", str(output)])) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(item["layers"], item["measured"]) for item in rows] == [
        (1, True), (2, True), (6, False)
    ]  # fmt: skip
    for item in rows[:2]:
        assert item["seconds"] > 1
        # Nearly all of it is Python and its libraries. Of their files only those pages count that
        # the system has mapped, which are fewer where the page cache is cold.
        assert 0.7 <= item["foretold_peak_bytes"] / item["peak_bytes"] <= 1.5
    assert str(tmp_path) not in output.read_text()
    assert "extrapolated" in output.with_suffix(".md").read_text()
