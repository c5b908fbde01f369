# SPDX-License-Identifier: Apache-2.0
"""A calibration killed at any moment and resumed gives the bytes of one that was not."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., tuple[int, str, str]]


def fork(command: Command, *arguments: Any) -> int:
    """Start the command in a forked child, which has torch loaded already; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it
    try:
        status, _, error = command(*arguments)
        os.write(2, error.encode())
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("paper", "llama"),
        ("sensitivity", "llama"),
        ("sensitivity", "opt"),
        ("coded", "llama"),
        ("coded", "opt"),
    ],
)
@pytest.mark.slow
def test_killed_and_resumed_is_byte_identical(
    method: str,
    kind: str,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    width = {"word_embed_proj_dim": 64} if kind == "opt" else {}
    model = make_model(kind, num_hidden_layers=6, hidden_size=64, **width)
    options = ("--kv-ratio", 0.45, "--text", text_file, "--samples", 12, "--seq-len", 24)
    options = (*options, "--method", method)
    whole = ("calibrate", model, "--output", tmp_path / "whole", *options)
    assert command(*whole, "--overwrite")[0] == 0  # the first run pays for imports
    begun = time.monotonic()
    assert command(*whole, "--overwrite")[0] == 0
    duration = time.monotonic() - begun
    expected = contents(tmp_path / "whole")
    rng = random.Random(method)
    for moment in range(10):
        output = tmp_path / f"cut{moment}"
        arguments = ("calibrate", model, "--output", output, *options, "--resume")
        child = fork(command, *arguments)
        time.sleep(rng.uniform(0, 1.2) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not output.exists():
            status, _, error = command(*arguments)
            assert status == 0, error
        assert contents(output) == expected
        assert not list(tmp_path.glob(f".cut{moment}.*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_leaves_nothing(
    number: signal.Signals,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    model = make_model("llama", num_hidden_layers=60)
    before = sorted(tmp_path.iterdir())
    options = ("--kv-ratio", 0.6, "--text", text_file, "--seq-len", 24)
    child = fork(command, "calibrate", model, "--output", tmp_path / "out", *options)
    time.sleep(1.0)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert sorted(tmp_path.iterdir()) == before
