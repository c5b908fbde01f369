# SPDX-License-Identifier: Apache-2.0
"""The report page: its plots exist, are referred to, and show something."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

Command = Callable[..., tuple[int, str, str]]


def test_report_on_two_checkpoints(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    model = make_model()
    folders = []
    for method, kv_ratio in (("paper", 0.8), ("sensitivity", 0.5)):
        folders.append(tmp_path / method)
        arguments = ("--kv-ratio", kv_ratio, "--text", text_file, "--method", method)
        status, _, error = command(
            "calibrate", model, "--output", folders[-1], *arguments, "--seq-len", 24
        )
        assert status == 0, error
    status, out, error = command("report", *folders, "--output", tmp_path / "report")
    assert status == 0, error
    page = Path(out.strip())
    text = page.read_text(encoding="utf-8")
    files = set(re.findall(r'src="([^"]+)"', text))
    assert {"quality.png", "ranks-0.png", "spectrum-1.png", "losses-1.png"} <= files
    assert "losses-0.png" not in files  # the paper's rule measures no such thing
    for name in files:
        pixels = image.imread(page.parent / name)
        assert pixels[..., :3].std() > 0.05, name
    assert re.search(r"<td>0\.[78]\d{3}</td>", text)
    assert command("report", *folders, "--output", tmp_path / "report")[0] == 1


def test_report_refuses_what_does_not_belong_together(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    folders = []
    for name, changes in (("a", {}), ("b", {"num_hidden_layers": 3})):
        folders.append(tmp_path / f"{name}-eigen")
        model: Any = make_model("llama", name, **changes)
        arguments = ("--kv-ratio", 1, "--text", text_file, "--seq-len", 24)
        assert command("calibrate", model, "--output", folders[-1], *arguments)[0] == 0
    status, _, error = command("report", *folders, "--output", tmp_path / "report")
    assert status == 1
    assert "different base models" in error
    assert not (tmp_path / "report").exists()
    assert command("report", tmp_path)[0] == 1


def checkpoint(make_model: Callable[..., Path], text: Path, folder: Path, command: Command) -> Path:
    arguments = ("--kv-ratio", 0.5, "--text", text, "--seq-len", 16, "--method", "sensitivity")
    status, _, error = command("calibrate", make_model(), "--output", folder, *arguments)
    assert status == 0, error
    return folder


def test_sweeps_agree_with_the_checkpoint(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    folder = checkpoint(make_model, text_file, tmp_path / "eigen", command)
    arguments = ("--output", tmp_path / "report", "--text", text_file, "--samples", 8)
    status, out, error = command("report", folder, *arguments, "--sweep", "ratios,samples")
    assert status == 0, error
    text = Path(out.strip()).read_text(encoding="utf-8")
    for name in ("bytes.png", "samples.png"):
        assert f'src="{name}"' in text
        assert image.imread(tmp_path / "report" / name)[..., :3].std() > 0.05
    record = json.loads((tmp_path / "report" / "sweep.json").read_text())
    full, rounded = record["ratios"][:2]
    assert full["kv_ratio"] == rounded["kv_ratio"] == 1
    assert full["quality"]["kl_per_token"] == pytest.approx(0, abs=1e-9)
    assert (full["fp8"], rounded["fp8"]) == (False, True)
    assert rounded["quality"]["kl_per_token"] > 1e-6
    ratios = [point["kv_ratio"] for point in record["ratios"]]
    assert ratios == sorted(ratios, reverse=True)
    losses = [p["quality"]["kl_per_token"] for p in record["ratios"] if not p["fp8"]]
    assert losses[-1] > losses[1]
    assert [point["samples"] for point in record["samples"]] == [2, 8]
    # The sweep's last calibration is one that `calibrate` would make and `evaluate` would measure.
    same = next(p for p in record["ratios"] if not p["fp8"] and abs(p["kv_ratio"] - 0.5) < 0.02)
    assert same["quality"] == record["samples"][-1]["quality"]


def test_a_fine_tuned_checkpoint_shows_its_log(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    folder = checkpoint(make_model, text_file, tmp_path / "eigen", command)
    config = json.loads((folder / "config.json").read_text())
    log = [[0, 3.0], [10, 2.5], [20, 2.4]]
    config["eigen"]["provenance"]["finetune"] = {"losses": log, "text": "some.txt"}
    (folder / "config.json").write_text(json.dumps(config))
    status, out, error = command("report", folder, "--output", tmp_path / "report")
    assert status == 0, error
    assert 'src="finetune-0.png"' in Path(out.strip()).read_text(encoding="utf-8")
    assert image.imread(tmp_path / "report" / "finetune-0.png")[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweep", "colours"), "--sweep colours"),
        (("--text", "x.txt"), "--text is for --sweep"),
        (("--sweep", "ratios", "--samples", 0), "--samples 0"),
        (("--sweep", "ratios", "--text", "no.txt"), "cannot be read"),
    ],
)
def test_refusals(
    arguments: tuple[Any, ...],
    message: str,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    folder = checkpoint(make_model, text_file, tmp_path / "eigen", command)
    status, _, error = command("report", folder, "--output", tmp_path / "report", *arguments)
    assert status in (1, 2)
    assert message in error.strip().splitlines()[-1]
    assert not (tmp_path / "report").exists()
