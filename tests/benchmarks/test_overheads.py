# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of the overhead benchmark, and what it asks of a server."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.fake_server import Fake, serving
from vllm_eigen import cli
from vllm_eigen.benchmarks.engine import overheads
from vllm_eigen.benchmarks.engine.overhead_report import Overhead, markdown, save, stored
from vllm_eigen.benchmarks.lib.decoding import tokens_per_second
from vllm_eigen.benchmarks.lib.processes import cpu_seconds
from vllm_eigen.common.errors import InputError
from vllm_eigen.common.progress import Reporter


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
    path.with_suffix(".md").unlink()
    assert cli.main(["bench", "overheads", "--from", str(path)]) == 0
    assert "| two | 1 s | 2 s | 2.000" in path.with_suffix(".md").read_text(encoding="utf-8")
    for damaged in ("[]", "{}"):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(InputError, match="no result"):
            stored(path)


def test_a_measurement_names_its_model_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "overheads", "--base", "model"]) == 2
    assert "needs --text, --output" in capsys.readouterr().err


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


def test_decode_compares_pair_by_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All rows, on servers that answer at once: what is compared with what, and how often."""
    asked: list[tuple[str, ...]] = []
    fakes = [Fake(slots=2, delay=0.001), Fake(slots=2, delay=0.002)]

    @contextlib.contextmanager
    def running(model: str | Path, *options: str, **more: Any) -> Iterator[Any]:
        asked.append((Path(model).name, *options[len(overheads.OPTIONS) :]))
        fake = fakes[len(asked) % 2]
        yield SimpleNamespace(url=fake.url, process=SimpleNamespace(pid=os.getpid()))

    monkeypatch.setattr("vllm_eigen.benchmarks.lib.servers.running", running)
    monkeypatch.setattr(overheads, "_calibrate", lambda args, folder, *options, **more: folder)
    monkeypatch.setattr(overheads, "read_stream", lambda server: contextlib.nullcontext())
    monkeypatch.setattr(overheads, "NAME", "fake")
    args = argparse.Namespace(base=tmp_path / "base", starts=2, pairs=2, users=2, tokens=4)
    with serving(fakes[0]), serving(fakes[1]), Reporter(quiet=True) as reporter:
        rows = list(overheads.measure(args, tmp_path, reporter))
    assert [(row.unit, len(row.ratios)) for row in rows] == [
        ("s", 2), ("tokens/s", 2), ("us/token", 2), ("tokens/s", 2),
    ]  # fmt: skip
    assert sorted(asked[:6]) == [("base",)] * 3 + [("folded",)] * 3
    assert asked[6:] == [
        ("folded",), ("folded",), ("folded",), ("base", "--eigen-bases", str(tmp_path / "bases")),
    ]  # fmt: skip
