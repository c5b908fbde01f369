"""Arithmetic of the overhead benchmark, and what it asks of a server."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.decoding import tokens_per_second
from benchmarks.overheads import Overhead, markdown, save, stored
from benchmarks.processes import cpu_seconds


def test_ratios_are_taken_pair_by_pair() -> None:
    found = Overhead.of("a question", "s", [1.0, 10.0, 2.0], [1.1, 9.0, 2.0])
    assert found.ratios == (1.1, 0.9, 1.0)
    assert (found.one, found.other, found.median) == (2.0, 2.0, 1.0)
    assert (found.low, found.high) == pytest.approx((0.95, 1.05))
    assert "| a question | 2 s | 2 s | 1.000 (0.950 to 1.050) | 3 |" in markdown([asdict(found)])


def test_a_run_replaces_the_rows_it_measures(tmp_path: Path) -> None:
    path = tmp_path / "overheads.json"
    assert stored(path) == {}
    old, new = (Overhead.of("one", "s", [1.0, 1.0], [r, r]) for r in (2.0, 3.0))
    save(path, {"one": asdict(old), "two": asdict(old) | {"what": "two"}})
    rows = stored(path)
    rows["one"] = asdict(new)
    save(path, rows)
    assert [row["median"] for row in stored(path).values()] == [3.0, 2.0]
    assert "| two | 1 s | 2 s | 2.000" in path.with_suffix(".md").read_text(encoding="utf-8")
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit, match="no result"):
        stored(path)


class Client:
    """Answers after a while with as many tokens as were asked for."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked = seconds, []  # type: ignore[var-annotated]
        self.completions = SimpleNamespace(create=self.create)

    def create(self, **request: Any) -> Any:
        self.asked.append(request)
        time.sleep(self.seconds)
        return SimpleNamespace(usage=SimpleNamespace(completion_tokens=request["max_tokens"]))


def test_users_ask_at_the_same_time() -> None:
    client = Client(seconds=0.2)
    speed = tokens_per_second(client, "model", ["a", "b"], users=4, tokens=10)
    assert 40 / 0.8 < speed <= 40 / 0.2, "all four at once, none faster than the server"
    assert sorted(request["prompt"] for request in client.asked) == ["a", "a", "b", "b"]
    assert all(request["extra_body"] == {"ignore_eos": True} for request in client.asked)


def test_cpu_time_is_work_not_waiting() -> None:
    pid = os.getpid()
    before = cpu_seconds(pid)
    time.sleep(0.3)
    waited = cpu_seconds(pid) - before
    began = time.process_time()
    while time.process_time() - began < 0.3:
        pass
    assert waited < 0.1
    assert cpu_seconds(pid) - before - waited >= 0.25
    assert cpu_seconds(2**30) == 0.0
