# SPDX-License-Identifier: Apache-2.0
"""`bench gpu` without a GPU: its one line, its points, its report, and what it leaves out."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_eigen.benchmarks.kernels.gpu import engine, grid, report, sanitizer
from vllm_eigen.cli import main

PROVENANCE = {"commit": "abc", "date": "today", "device": {"name": "a GPU"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main(["bench", "gpu"]) != 0
    captured = capsys.readouterr()
    [line] = captured.err.strip().splitlines()
    assert "bench gpu needs an NVIDIA GPU and finds none" in line
    assert captured.out == ""


def test_the_grid_has_every_kernel() -> None:
    checked, timed = list(grid.checked(False)), list(grid.timed(False))
    for points in (checked, timed, list(grid.checked(True)), list(grid.timed(True))):
        assert {point.bits for point in points} == {16, 8, 4, 2}
        assert {point.phase for point in points} == {"decode", "prefill"}
        assert {point.key_mode.reconstructs_keys for point in points} == {True, False}
    assert {point.head_size for point in checked} == {64, 128, 256}
    assert any((p.context, p.batch, p.heads) == (32_768, 32, 32) for p in timed)
    for point in (*checked, *timed):
        assert max(point.ranks) <= point.head_size


def _row(**changes: Any) -> dict[str, Any]:
    row = {"bits": 4, "ranks": [60, 64], "key_mode": "no-rope", "heads": 32, "kv_heads": 8}
    row |= {"head_size": 64, "phase": "decode", "context": 128, "batch": 2}
    return row | {"relative_error": 1e-3, "agrees": True, "replays": True} | changes


@pytest.mark.parametrize(
    ("result", "right"),
    [
        ({"correctness": [_row()]}, True),
        ({"correctness": [_row(), _row(agrees=False)]}, False),
        ({"correctness": [_row(replays=False)]}, False),
        ({"sanitizer": {"errors": 2, "report": ["x"]}}, False),
        ({"sanitizer": {"skipped": "it is not installed"}}, True),
        ({"engine": {"failed": "exit status 1", "report": ["boom"]}}, False),
        ({"engine": {"skipped": "vllm is not installed"}}, True),
    ],
)
def test_verdict_and_table(result: dict[str, Any], right: bool) -> None:
    document = {"provenance": PROVENANCE, "left_out": ["timing: no time left"], **result}
    assert report.is_right(document) is right
    text = "\n".join(report.tables(document))
    assert "on a GPU" in text
    assert "- timing: no time left" in text
    assert ("WRONG" in text) is ("correctness" in result and not right)
    for stage in result.values():
        for line in [stage] if isinstance(stage, list) else stage.values():
            assert isinstance(line, list) or str(line) in text


def test_the_fastest_baseline_reads_full_heads() -> None:
    taken = {"eigen": 1.0, "triton_attn_diffkv": 0.5, "torch_sdpa": 3.0, "triton_attn": 2.0}
    assert report.fastest(taken) == ("triton_attn", 2.0)
    assert report.fastest({"eigen": 1.0, "triton_attn_diffkv": 0.5}) == (None, 0.0)


def test_the_sanitizers_report_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitizer.read("..\n========= ERROR SUMMARY: 0 errors\n") == {"errors": 0}
    assert sanitizer.read("========= ERROR SUMMARY: 3 errors")["errors"] == 3
    assert sanitizer.read("it crashed") == {"errors": None, "report": ["it crashed"]}
    monkeypatch.setattr(sanitizer.shutil, "which", lambda _: None)
    assert sanitizer.run(1) == {"skipped": "compute-sanitizer is not installed"}


def test_the_engine_is_skipped_or_fails_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _: None)
    assert engine.run(1) == {"skipped": "vllm is not installed"}
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _: object())

    def fails(command: list[str], **_: Any) -> Any:
        assert Path(command[-1]).name == "engine.json"
        return SimpleNamespace(returncode=1, stdout="", stderr="no\nGPU")

    monkeypatch.setattr(subprocess, "run", fails)
    assert engine.run(1) == {"failed": "exit status 1", "report": ["no", "GPU"]}
