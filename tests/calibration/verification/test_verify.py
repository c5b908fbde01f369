# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen verify` with an engine made of the reference, which is right or wrong as asked.

`tests/plugin/test_verify.py` runs it on vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.calibration.coded import coded_ranks, write_coded
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.calibration.verification import tasks, verify
from vllm_eigen.checkpoint.codes import Code

Command = Callable[..., tuple[int, str, str]]
NAMES = ["capacity", "prefill", "chunked prefill", "decode", "prefix hit", "preemption"]


@dataclass
class Engine:
    """What `verify` uses of an engine, by the reference in float32.

    Attributes:
        concurrency: sequences that the pool holds.
        factor: on the logits of every token after a prompt's first.
        cached: prompt tokens of a prefix hit.
        preempts: whether the pool overflows.
    """

    folder: Path
    options: dict[str, Any]
    concurrency: float = tasks.POOL
    factor: float = 1.0
    cached: int = 32
    preempts: bool = True
    dtype: str = "float32"
    in_flight: int = tasks.CHUNK
    preemptions: int = 0

    def __enter__(self) -> Engine:
        self.model = load_reference(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def max_concurrency(self) -> float:
        return self.concurrency

    def counter(self, name: str) -> float:
        assert name == "vllm:num_preemptions"
        return self.preemptions

    def generate(self, prompts: Sequence[list[int]], **sampling: Any) -> list[Any]:
        assert sampling["temperature"] == 0
        if len(prompts) == tasks.SEQUENCES and self.preempts:
            self.preemptions += 3
        return [self._answer(prompt, **sampling) for prompt in prompts]

    def _answer(self, prompt: list[int], max_tokens: int, logprobs: int, **_: Any) -> Any:
        ids, rows = list(prompt), []
        for place in range(min(max_tokens, 5)):  # the reference reads what is there
            with torch.no_grad():
                logits = self.model(torch.tensor([ids])).logits[0, -1]
            values, tokens = (logits * (self.factor if place else 1)).topk(logprobs)
            ids.append(int(tokens[0]))
            pairs = zip(tokens.tolist(), values.tolist(), strict=True)
            rows.append({token: SimpleNamespace(logprob=value) for token, value in pairs})
        output = SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=rows)
        return SimpleNamespace(outputs=[output], num_cached_tokens=self.cached)


@pytest.fixture
def folder(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    base = make_model(max_position_embeddings=tasks.SHORTEST, num_hidden_layers=1, head_dim=32)
    ranks = [coded_ranks(Code(eight=32), Code(four=32, token_scale=True))]
    write_coded(base, tmp_path / "eigen", ranks)
    return tmp_path / "eigen"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Changes of the engine that `verify` will start."""
    changes: dict[str, Any] = {}
    monkeypatch.setattr(
        verify, "start_engine", lambda folder, **options: Engine(folder, options, **changes)
    )
    return changes


def test_right(folder: Path, engine: dict[str, Any], command: Command) -> None:
    status, out, error = command("verify", folder, "--dtype", "float32")
    assert status == 0, out + error
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    table = [line for line in lines if line[:15].strip() in NAMES]
    assert [line[:15].strip() for line in table] == NAMES
    assert {line[16:23].strip() for line in table} == {"ok"}


@pytest.mark.parametrize(
    ("change", "name", "state"),
    [
        ({"concurrency": 1.05 * tasks.POOL}, "capacity", "wrong"),
        ({"factor": 1.3}, "decode", "wrong"),
        ({"cached": 0}, "prefix hit", "wrong"),
        ({"preempts": False}, "preemption", "not run"),
        ({"factor": float("nan")}, "chunked prefill", "wrong"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_what_is_found(
    change: dict[str, Any],
    name: str,
    state: str,
    folder: Path,
    engine: dict[str, Any],
    command: Command,
) -> None:
    engine.update(change)
    status, out, _ = command("verify", folder, "--json")
    assert "Infinity" not in out
    found = json.loads(out)
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert list(states) == NAMES
    assert states[name] == state, out
    assert states["prefill"] == "ok"  # one token a prompt, its first
    assert found["passed"] == (status == 0) == ("wrong" not in states.values())


def test_rounding_is_allowed_for(folder: Path, engine: dict[str, Any], command: Command) -> None:
    """An engine in bfloat16 may be off by what rounding does, one in float32 not."""
    engine.update(factor=1.03)
    assert command("verify", folder)[0] == 1
    engine.update(dtype="bfloat16")
    status, out, _ = command("verify", folder, "--json")
    limits = {
        check["name"]: check["values"].get("median_limit") for check in json.loads(out)["checks"]
    }
    assert all(limit > 0.011 for name, limit in limits.items() if name != "capacity")
    assert status == 0, out


def test_too_short(make_model: Callable[..., Path], tmp_path: Path, command: Command) -> None:
    base = make_model(max_position_embeddings=64, num_hidden_layers=1, head_dim=32)
    ranks = [coded_ranks(Code(eight=32), Code(eight=32))]
    write_coded(base, tmp_path / "short", ranks)
    status, _, error = command("verify", tmp_path / "short")
    assert (status, "128 are needed" in error) == (1, True), error
