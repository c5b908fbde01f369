# SPDX-License-Identifier: Apache-2.0
"""Explicit rank files and groups of heads, through the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_eigen.checkpoint.validate import validate

Command = Callable[..., tuple[int, str, str]]


def test_rank_file(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    model, file = make_model(), tmp_path / "ranks.json"
    file.write_text("[[3, 8], [1, 5]]")
    arguments = ("--ranks", file, "--text", text_file, "--seq-len", 24, "--method", "paper")
    status, _, error = command("calibrate", model, "--output", tmp_path / "out", *arguments)
    assert status == 0, error
    layers = validate(tmp_path / "out").layers
    assert [(layer.rank_k, layer.rank_v) for layer in layers] == [(3, 8), (1, 5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[3, 8]]", "has 1 layers, the model 2"),
        ("[[3, 9], [1, 5]]", "exceed the full 8"),
        ("[[0, 8], [1, 5]]", "at least 1"),
        ("{", "not a JSON list"),
        ("3", "not a JSON list"),
    ],
)
def test_bad_rank_file(
    content: str,
    message: str,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    file = tmp_path / "ranks.json"
    file.write_text(content)
    arguments = ("--ranks", file, "--text", text_file, "--seq-len", 24, "--method", "paper")
    status, _, error = command("calibrate", make_model(), "--output", tmp_path / "out", *arguments)
    assert status == 1
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "opt", "mpt", "qwen3"])
def test_groups_of_heads(
    kind: str,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    output = tmp_path / "out"
    options = ("--kv-ratio", 0.7, "--head-group", 2, "--method", "sensitivity", "--seq-len", 24)
    status, _, error = command(
        "calibrate", make_model(kind), "--output", output, "--text", text_file, *options
    )
    assert status == 0, error
    eigen = validate(output)
    assert eigen.head_group == 2
    assert abs(eigen.kv_ratio - 0.7) < 0.02
    status, out, error = command("evaluate", output, "--text", text_file, "--json")
    assert status == 0, error
    found = json.loads(out)["eigen"]["perplexity"]
    card = eigen.provenance["measured"]["eigen_perplexity"]
    assert 0.5 < found / card < 2
    for group, message in ((3, "does not divide"), (64, "goes up to")):
        status, _, error = command(
            "calibrate",
            make_model(kind),
            "--output",
            tmp_path / "no",
            "--kv-ratio",
            0.5,
            "--head-group",
            group,
            "--method",
            "sensitivity",
            "--text",
            text_file,
        )
        assert status == 2
        assert message in error
