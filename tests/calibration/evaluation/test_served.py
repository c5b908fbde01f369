# SPDX-License-Identifier: Apache-2.0
"""`evaluate --engine vllm` without vLLM: a stand-in engine gives what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_eigen.calibration.evaluation import served
from vllm_eigen.calibration.evaluation.engine import Engine, read_logprobs
from vllm_eigen.calibration.evaluation.scoring import TokenLogprobs
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.model.transformers_model import load_base

Command = Callable[..., tuple[int, str, str]]


class StandIn(Engine):
    """An engine that computes with transformers."""

    def __init__(
        self, model: Path, *, length: int, token_bytes: int, kv_cache_dtype: str = ""
    ) -> None:
        config = json.loads((model / "config.json").read_text())
        eigen = "eigen" in config
        self._model: Any = load_reference(model) if eigen else load_base(open_source(str(model)))
        assert token_bytes > 0
        assert kv_cache_dtype == ("fp8" if eigen else "")  # the base keeps its own type
        self._length = length

    def __exit__(self, *_: object) -> None:
        del self._model

    def logprobs(
        self, sequences: Iterable[list[int]], vocab_size: int | None = None
    ) -> Iterator[TokenLogprobs]:
        for sequence in sequences:
            assert len(sequence) <= self._length
            tokens = torch.tensor(sequence)
            with torch.no_grad():
                whole = self._model(tokens[None]).logits[0, :-1].log_softmax(-1)
            found = whole.gather(-1, tokens[1:, None])[:, 0]
            asked = None if vocab_size is None else whole
            yield TokenLogprobs(tokens[1:], found, whole.argmax(-1), asked)


def test_results_are_those_of_transformers(
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served, "Engine", StandIn)
    monkeypatch.setattr("vllm_eigen.plugin.vllm_version.check_vllm_version", lambda: "0.32.0")
    output, task = tmp_path / "out", tmp_path / "task.jsonl"
    task.write_text('{"ctx": "w1 w2", "choices": ["w3", "w4 w5"], "gold": 1}\n' * 3)
    # The window of both engines is 32: the model takes one token more than vLLM lets it read.
    model = make_model(max_position_embeddings=33)
    arguments = ("--kv-ratio", 0.4, "--text", text_file, "--seq-len", 24, "--method", "paper")
    assert command("calibrate", model, "--output", output, *arguments)[0] == 0
    monkeypatch.setattr("vllm_eigen.calibration.evaluation.evaluate.WINDOW", 32)
    results = {}
    tail = ("--text", text_file, "--tasks", task, "--json")
    for engine in ("transformers", "vllm"):
        fp8 = ("--kv-cache-dtype", "fp8") if engine == "vllm" else ()
        status, out, error = command("evaluate", output, *tail, "--engine", engine, *fp8)
        assert status == 0, error
        results[engine] = json.loads(out)
    offline, found = results["transformers"], results["vllm"]
    for name in ("base", "eigen"):
        expected = offline[name]["perplexity"]
        assert found[name]["perplexity"] == pytest.approx(expected, rel=1e-5)
    for name in ("kl_per_token", "top1_agreement", "tokens", "window"):
        assert found[name] == pytest.approx(offline[name], rel=1e-4), name
    assert found["tasks"] == offline["tasks"]
    assert found["notes"] == []

    monkeypatch.setattr(served, "MAX_VOCAB_LOGPROBS", 100)
    status, out, _ = command(
        "evaluate", output, *tail, "--engine", "vllm", "--kv-cache-dtype", "fp8"
    )
    assert status == 0
    without = json.loads(out)
    assert without["kl_per_token"] is None
    assert "vocabulary of 63" in without["notes"][0]
    assert without["top1_agreement"] == found["top1_agreement"]
    status, _, error = command("evaluate", output, *tail, "--engine", "vllm", "--device", "cpu")
    assert status == 2
    assert "--device is for transformers" in error


def test_reads_what_vllm_gives() -> None:
    """Two positions of a vocabulary of three: the following token first, then all by likelihood."""
    flat = SimpleNamespace(
        start_indices=[0, 0, 4],
        end_indices=[0, 4, 8],
        token_ids=[2, 0, 2, 1, 1, 1, 0, 2],
        logprobs=[-1.5, -0.5, -1.5, -2.5, -0.1, -0.1, -3.0, -4.0],
    )
    found = read_logprobs(flat, 3)
    assert found.tokens.tolist() == [2, 1]
    assert found.logprobs.tolist() == pytest.approx([-1.5, -0.1])
    assert found.top1.tolist() == [0, 1]
    assert found.vocab_logprobs is not None
    expected = torch.tensor([[-0.5, -2.5, -1.5], [-3.0, -0.1, -4.0]])
    torch.testing.assert_close(found.vocab_logprobs, expected)
