# SPDX-License-Identifier: Apache-2.0
"""`evaluate --engine vllm`: the served models' scores are those of transformers, within rounding.

The checkpoints are in bfloat16, in which vLLM computes and transformers does not, hence the
tolerances: 0.2 % of a perplexity, 0.0004 nats of KL, 1 % of the likeliest tokens.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from demo import texts
from tests.plugin.conftest import Models
from tests.plugin.harness.engine import start_quickly
from vllm_eigen import cli


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
@pytest.mark.slow
def test_served_figures_are_those_of_transformers(
    dtype: str,
    models: Models,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In this process an engine starts in a second and not in twenty.
    start_quickly(monkeypatch)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    text = tmp_path / "held-out.txt"
    texts.write("heldout", text, 60_000)
    words = text.read_text(encoding="utf-8").split()
    rng = random.Random(0)
    task = tmp_path / "task.jsonl"
    with task.open("w", encoding="utf-8") as file:
        for _ in range(20):
            start = rng.randrange(len(words) - 40)
            right = " ".join(words[start + 30 : start + 40])
            wrong = "".join(rng.sample(right, len(right)))
            item = {
                "ctx": " ".join(words[start : start + 30]),
                "choices": [wrong, right],
                "gold": 1,
            }
            file.write(json.dumps(item) + "\n")
    base, eigen = models("trained", "bfloat16", 0), models("trained", "bfloat16", 0.6)
    arguments = ["evaluate", str(eigen), "--base", str(base), "--text", str(text), "--json"]
    arguments += ["--max-tokens", "8192", "--kv-cache-dtype", dtype, "--tasks", str(task)]
    found: dict[str, Any] = {}
    capfd.readouterr()
    for engine in ("transformers", "vllm"):
        assert cli.main([*arguments, "--engine", engine]) == 0
        found[engine] = json.loads(capfd.readouterr().out)
        assert found[engine].pop("engine") == engine
    offline, served = found["transformers"], found["vllm"]
    assert (offline.pop("window"), served.pop("window")) == (2048, 2047)
    for name in ("base", "eigen"):
        expected = offline[name]["perplexity"]
        assert served[name]["perplexity"] == pytest.approx(expected, rel=2e-3)
        scores = [item["tasks"]["task"][name]["acc"] for item in (offline, served)]
        assert scores[0] > 0.7
        assert scores[1] == pytest.approx(scores[0], abs=0.1)
    assert served["kl_per_token"] == pytest.approx(offline["kl_per_token"], abs=4e-4)
    assert served["kl_per_token"] > 0
    assert served["top1_agreement"] == pytest.approx(offline["top1_agreement"], abs=0.01)
    assert served["kv_cache_dtype"] == dtype
    assert set(served) == set(offline)
