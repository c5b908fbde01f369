# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen finetune` on tiny models: what it must win, keep and refuse."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.calibration.export.test_scales import calibrated
from tests.calibration.tiny import WORDS, build_model
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.checkpoint.shapes import KEY_BASIS
from vllm_eigen.checkpoint.validate import validate

Command = Callable[..., tuple[int, str, str]]
CASES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("llama", (), {}),
    ("llama", ("--head-group", 2), {"attention_bias": True}),
    ("llama", ("--key-cache", "post-rope"), {}),
    ("opt", (), {}),
    ("opt", ("--head-group", 2), {}),
    ("mpt", (), {}),
]


@pytest.fixture
def ordered_text(tmp_path: Path) -> Path:
    """Text that can be learnt: most words are followed by the next one of the list."""
    rng, documents = random.Random(1), []
    for _ in range(60):
        at = [rng.randrange(len(WORDS))]
        for _ in range(40):
            at.append((at[-1] + (1 if rng.random() < 0.8 else rng.randrange(9))) % len(WORDS))
        documents.append(" ".join(WORDS[n] for n in at))
    path = tmp_path / "ordered.txt"
    path.write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return path


def shapes(folder: Path) -> dict[str, Any]:
    """Shape and type of every tensor."""
    tensors = load_file(folder / "model.safetensors")
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("kind", "options", "changes"), CASES, ids=str)
def test_loss_falls_and_the_format_stays(
    kind: str,
    options: tuple[Any, ...],
    changes: dict[str, Any],
    make_model: Callable[..., Path],
    text_file: Path,
    ordered_text: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    folder = calibrated(kind, options, make_model, text_file, command, **changes)
    finetuned = tmp_path / "finetuned"
    size = ("--steps", 30, "--seq-len", 24, "--learning-rate", 3e-3)
    status, _, error = command(
        "finetune", folder, "--output", finetuned, "--text", ordered_text, *size
    )
    assert status == 0, error
    before, after = validate(folder), validate(finetuned)
    record = after.provenance["finetune"]
    assert record["loss"] < record["base_loss"] - 0.05
    # What is served is what was trained: merging lost nothing but the last bits.
    assert record["loss"] == pytest.approx(min(loss for _, loss in record["losses"]), abs=1e-4)
    assert [(item.rank_k, item.rank_v) for item in after.layers] == [
        (item.rank_k, item.rank_v) for item in before.layers
    ]
    assert after.layers[0].k_scale != before.layers[0].k_scale
    assert shapes(finetuned) == shapes(folder)
    assert str(tmp_path) not in (finetuned / "config.json").read_text()
    assert "Fine-tuned" in (finetuned / "README.md").read_text()
    changed = load_file(finetuned / "model.safetensors")
    frozen = [name for name, old in load_file(folder / "model.safetensors").items()
              if torch.equal(old, changed[name])]  # fmt: skip
    assert any("embed" in name or "wte" in name for name in frozen)
    for name, old in load_file(folder / "model.safetensors").items():
        if name.endswith(KEY_BASIS):
            assert torch.equal(old == 0, changed[name] == 0)
    if "post-rope" in options:
        assert any("q_proj" in name for name in frozen)


def test_same_seed_same_bytes_in_place(
    make_model: Callable[..., Path],
    text_file: Path,
    ordered_text: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    folder = calibrated("llama", (), make_model, text_file, command)
    tail = ("--text", ordered_text, "--steps", 5, "--seq-len", 24)
    assert command("finetune", folder, "--output", tmp_path / "finetuned", *tail)[0] == 0
    assert command("finetune", folder, "--overwrite", *tail)[0] == 0
    finetuned = (tmp_path / "finetuned/model.safetensors").read_bytes()
    assert finetuned == (folder / "model.safetensors").read_bytes()
    assert load_reference(folder) is not None


def test_without_output_nothing_is_replaced(
    make_model: Callable[..., Path], text_file: Path, ordered_text: Path, command: Command
) -> None:
    folder = calibrated("opt", (), make_model, text_file, command)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    tail = ("--text", ordered_text, "--steps", 5, "--seq-len", 24)
    status, out, error = command("finetune", folder, *tail)
    assert (status, out) == (2, "")
    assert "pass --output DIR2" in error.splitlines()[-1]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_worse_model_is_refused(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    folder = calibrated("opt", (), make_model, text_file, command)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    tail = ("--text", text_file, "--steps", 3, "--seq-len", 24, "--learning-rate", 100)
    for output in ((folder, "--overwrite"), (tmp_path / "finetuned",)):
        status, _, error = command("finetune", folder, "--output", *output, *tail)
        assert status == 1
        assert "does not help" in error.splitlines()[-1]
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 0), "--steps 0"),
        (("--learning-rate", "nan"), "--learning-rate nan"),
        (("--seq-len", 1), "--seq-len 1"),
        (("--text", "SHORT"), "held out"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    arguments: tuple[Any, ...], message: str, make_model: Callable[..., Path], text_file: Path,
    tmp_path: Path, command: Command,
) -> None:  # fmt: skip
    folder = calibrated("opt", (), make_model, text_file, command)
    short = tmp_path / "short.txt"
    short.write_text(" ".join(WORDS))
    given = [short if item == "SHORT" else item for item in arguments]
    text = () if "--text" in arguments else ("--text", text_file)
    size = () if "--seq-len" in arguments else ("--seq-len", 24)
    output = ("--output", tmp_path / "finetuned")
    status, _, error = command("finetune", folder, *output, *text, *size, *given)
    assert status in (1, 2)
    assert message in error.splitlines()[-1]


def test_a_model_that_merging_made_worse_is_refused(
    make_model: Callable[..., Path], text_file: Path, ordered_text: Path, tmp_path: Path,
    command: Command, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = calibrated("opt", (), make_model, text_file, command)
    before = (folder / "model.safetensors").read_bytes()
    other = build_model("opt", seed=9, init_std=2.0)
    monkeypatch.setattr(
        "vllm_eigen.calibration.finetuning.finetune.load_reference", lambda *_: other
    )
    output = ("--overwrite",)  # without --output: the checkpoint itself
    status, _, error = command(
        "finetune", folder, *output, "--text", ordered_text, "--seq-len", 24, "--steps", 5
    )
    assert status == 1
    assert "does not help" in error.splitlines()[-1]
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".out*"))
