"""The report page: its figures exist, are referred to, and show something."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
