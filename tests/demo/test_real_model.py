# SPDX-License-Identifier: Apache-2.0
"""What only a real model shows: calibration at the demo's ratio keeps SmolLM2 what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo import texts
from demo.run import KV_RATIO
from vllm_eigen import cli


@pytest.mark.slow
def test_the_demos_ratio_keeps_the_model(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration, heldout = (texts.write(split, tmp_path / split) for split in texts.SPLITS)
    output = tmp_path / "eigen"
    arguments = ["--text", str(calibration), "--samples", "4", "--seq-len", "256", "--quiet"]
    arguments += ["--kv-ratio", str(KV_RATIO), "--output", str(output)]
    assert cli.main(["calibrate", str(smollm2), *arguments]) == 0
    capsys.readouterr()
    arguments = ["evaluate", str(output), "--base", str(smollm2), "--text", str(heldout)]
    assert cli.main([*arguments, "--max-tokens", "2048", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kv_ratio"] <= KV_RATIO + 0.02
    assert 2 < found["base"]["perplexity"] < 30
    assert found["eigen"]["perplexity"] < 1.15 * found["base"]["perplexity"]
    assert 0 < found["kl_per_token"] < 0.15
