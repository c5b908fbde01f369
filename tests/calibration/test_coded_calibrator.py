# SPDX-License-Identifier: Apache-2.0
"""Coded latents from text to checkpoint, on tiny random models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.coded import coded_ranks
from tests.calibration.test_gradient_pass import job_of
from tests.calibration.test_resume import contents
from tests.calibration.tiny import build_model, save_model
from vllm_eigen.calibration.coded_calibrator import CodedCalibrator
from vllm_eigen.calibration.export.write import eigen_config, write_checkpoint
from vllm_eigen.calibration.held_out import HeldOut
from vllm_eigen.calibration.job import Job, Recipe
from vllm_eigen.calibration.methods import DEFAULT
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.calibration.preference import Preference
from vllm_eigen.calibration.target import Target
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.checkpoint.config import EigenConfig, parse_config
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.checkpoint.validate import serving_overrides, validate
from vllm_eigen.common.errors import UsageError

Command = Callable[..., tuple[int, str, str]]
OPT = {"hidden_size": 128, "word_embed_proj_dim": 128}
LLAMA = {"head_dim": 32, "hidden_size": 48}
VARIANTS: list[tuple[str, dict[str, Any], KeyMode]] = [
    ("llama", LLAMA, KeyMode.PRE_ROPE),
    ("llama", LLAMA, KeyMode.POST_ROPE),
    ("opt", OPT, KeyMode.NO_ROPE),
]
WINDOWS = 40
SMALL = ("--samples", 12, "--seq-len", 24)


def coded_job(folder: Path, key_mode: KeyMode | None = None, **options: Any) -> Job:
    job = job_of(folder, **options)
    recipe = Recipe.resolve(job.model.source, "coded", key_mode=key_mode)
    tokens = torch.randint(3, 60, (WINDOWS, 24), generator=torch.Generator().manual_seed(1))
    return replace(job, recipe=recipe, tokens=tokens)


@pytest.mark.parametrize(("kind", "changes", "key_mode"), VARIANTS, ids=str)
def test_more_bits_lose_less_and_the_checkpoint_is_what_was_measured(
    kind: str, changes: dict[str, Any], key_mode: KeyMode, tmp_path: Path
) -> None:
    base = save_model(build_model(kind, **changes), tmp_path / "base")
    job = coded_job(base, key_mode)
    calibrator = CodedCalibrator(job)
    held_out = HeldOut(job.model, torch.randint(3, 60, (4, 24)))
    widths = [
        coded_ranks(Code(eight=32), Code(eight=32, token_scale=True)),
        coded_ranks(Code(four=32), Code(four=32, token_scale=True)),
        coded_ranks(Code(two=32), Code(four=16, two=16, token_scale=True)),
    ]
    losses = []
    for ranks in widths:
        compressed = calibrator.compress([ranks] * 2)
        losses.append(held_out.quality(compressed).kl_per_token)
    assert 0 <= 10 * losses[0] < losses[1] < losses[2]

    # Written and read back: the same model.
    eigen = eigen_config(
        job.model.source,
        compressed.ranks,
        key_mode=key_mode,
        method="coded",
        head_group=1,
        provenance={},
        key_offset=True,
    )
    write_checkpoint(job.model.source, eigen, compressed.bases, tmp_path / "eigen")
    assert validate(tmp_path / "eigen").kv_ratio == pytest.approx(compressed.kv_ratio)
    tokens = torch.randint(3, 60, (3, 24))
    streamed = job.model.logits(tokens, compressed.run(tokens).hidden)
    with torch.no_grad():
        stored = load_reference(tmp_path / "eigen")(tokens).logits
        exact = build_model(kind, **changes)(tokens).logits
    # A latent next to the border of two codes may get the other one.
    moved = (streamed - exact).square().mean().sqrt()
    assert float((stored - streamed).square().mean().sqrt()) < 0.05 * float(moved)


@pytest.mark.parametrize("ratio", [0.5, 0.34, 0.21])
def test_the_ratio_is_a_limit_and_is_used(ratio: float, tmp_path: Path) -> None:
    changes = {"head_dim": 64, "hidden_size": 128, "num_hidden_layers": 4}
    job = coded_job(save_model(build_model("llama", **changes), tmp_path))
    calibrator = CodedCalibrator(job)
    allocation = calibrator.allocate(Target(ratio))
    compressed = calibrator.compress(allocation.ranks)
    assert 0.98 * ratio <= compressed.kv_ratio <= ratio
    smaller = calibrator.allocate(Target(0.9 * ratio))
    assert smaller.loss > allocation.loss > 0


def test_a_ratio_out_of_reach_names_one_within(tmp_path: Path) -> None:
    job = coded_job(save_model(build_model("llama", **LLAMA), tmp_path))
    calibrator = CodedCalibrator(job)
    with pytest.raises(UsageError, match="out of reach") as caught:
        calibrator.allocate(Target(0.01))
    (least,) = re.findall(r"at least ([\d.]+)", str(caught.value))
    allocation = calibrator.allocate(Target(float(least)))
    assert sum(rank.num_bytes(2) for rank in allocation.ranks) <= float(least) * 4 * 32 * 2
    with pytest.raises(UsageError, match="spends --kv-ratio"):
        calibrator.allocate(Target(error_budget=0.1))


def test_layers_kept_by_an_interrupted_run_are_not_made_again(tmp_path: Path) -> None:
    """The pass begins with the last layer; one stopped after it goes on below."""
    base = save_model(build_model("llama", num_hidden_layers=3, **LLAMA), tmp_path / "base")
    whole = CodedCalibrator(coded_job(base)).allocate(Target(0.4))
    made: list[int] = []

    class Stopping(CodedCalibrator):
        def _fit(self, index: int, samples: Any) -> Any:
            if index == 1 and made == [2]:
                raise KeyboardInterrupt
            made.append(index)
            return super()._fit(index, samples)

    with pytest.raises(KeyboardInterrupt):
        Stopping(coded_job(base, state=tmp_path / "state"))
    assert made == [2]
    made.clear()
    resumed = Stopping(coded_job(base, state=tmp_path / "state")).allocate(Target(0.4))
    assert made == [1, 0]
    assert resumed == whole


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_stopped_and_resumed_is_byte_identical(
    kind: str,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(kind, **(OPT if kind == "opt" else LLAMA))
    options = ("--kv-ratio", 0.4, "--text", text_file, *SMALL)
    status, _, error = command("calibrate", model, "--output", tmp_path / "whole", *options)
    assert status == 0, error
    fit = CodedCalibrator._fit

    def stop(self: CodedCalibrator, index: int, samples: Any) -> Any:
        if index == 0:
            raise KeyboardInterrupt
        return fit(self, index, samples)

    arguments = ("calibrate", model, "--output", tmp_path / "cut", *options, "--resume")
    with monkeypatch.context() as patched:
        patched.setattr(CodedCalibrator, "_fit", stop)
        with pytest.raises(KeyboardInterrupt):
            command(*arguments)
    status, _, error = command(*arguments)
    assert status == 0, error
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def calibrated(
    make_model: Callable[..., Path], text: Path, folder: Path, command: Command, *options: Any
) -> tuple[EigenConfig, str]:
    """The configuration of a checkpoint made without --method, and what the command printed."""
    arguments = ("--output", folder, "--text", text, *SMALL, "--kv-ratio", 0.4)
    status, _, error = command("calibrate", make_model("llama", **LLAMA), *arguments, *options)
    assert status == 0, error
    return validate(folder), error


def test_the_command_codes_by_default(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    assert DEFAULT == "coded"
    eigen, printed = calibrated(make_model, text_file, tmp_path / "out", command)
    assert eigen.method == "coded"
    assert eigen.coded
    kept = 0
    for layer in eigen.layers:
        assert layer.key_code is not None
        assert layer.value_code is not None
        for code in (layer.key_code, layer.value_code):
            kept += 2 * (sum(code.widths) // 8 + (2 if code.token_scale else 0))  # 2 KV heads
    full = 2 * 2 * 32 * 2 * 2  # K and V, heads, head size, layers, bytes of 16 bits
    last = printed.strip().splitlines()[-1]
    assert (
        f"KV ratio {kept / full:.4f}, {kept} cached bytes a token instead of {full} at 16 bits"
    ) in last
    spent = [float(text) for text in re.findall(r" (\d+\.\d+)(?:,| bits)", last.split(";")[1])]
    # The two parts have as many numbers, so that their mean is what the ratio leaves of 16 bits.
    assert sum(spent) / 2 == pytest.approx(16 * kept / full, abs=0.01)
    assert "keys pre-rope" in last
    record = eigen.provenance["calibration"]
    assert record["foretold_kl"] > 0
    assert record["refit"] is False
    measured = eigen.provenance["measured"]["eigen_perplexity"]
    status, out, error = command("evaluate", tmp_path / "out", "--text", text_file, "--json")
    assert status == 0, error
    found = json.loads(out)
    assert found["kv_ratio"] == pytest.approx(kept / full)
    assert 0.5 < found["eigen"]["perplexity"] / measured < 2


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ((), KeyMode.PRE_ROPE),
        (("--prefer", "memory"), KeyMode.PRE_ROPE),
        (("--prefer", "speed"), KeyMode.POST_ROPE),
    ],
)
def test_bits_and_preference(
    options: tuple[str, ...],
    mode: KeyMode,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    base = make_model("llama", **LLAMA)
    arguments = ("calibrate", base, "--text", text_file, *SMALL, *options)
    for name, size in (("bits", ("--kv-bits", 6.4)), ("ratio", ("--kv-ratio", 0.4))):
        status, _, error = command(*arguments, "--output", tmp_path / name, *size)
        assert status == 0, error
    bits, ratio = validate(tmp_path / "bits"), validate(tmp_path / "ratio")
    assert bits.layers == ratio.layers
    assert bits.key_mode is ratio.key_mode is mode


def test_speed_is_no_choice_where_keys_are_not_rotated() -> None:
    for preference in Preference:
        assert preference.key_mode((KeyMode.NO_ROPE,)) is KeyMode.NO_ROPE
    assert Preference.SPEED.key_mode((KeyMode.POST_ROPE,)) is KeyMode.POST_ROPE


def test_bases_alone(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    whole, _ = calibrated(make_model, text_file, tmp_path / "whole", command)
    options = ("--bases-only", "--text", text_file, *SMALL, "--kv-ratio", 0.4)
    model, output = tmp_path / "model", tmp_path / "bases"
    status, _, error = command("calibrate", model, "--output", output, *options)
    assert status == 0, error
    config = json.loads((model / "config.json").read_text())
    bases = parse_config(config | serving_overrides(output, config))
    assert bases.layers == whole.layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--error-budget", 0.1), "spends --kv-ratio R"),
        (("--ranks", "ranks.json"), "spends --kv-ratio R"),
        (("--kv-ratio", 0.4, "--refit"), "--refit"),
    ],
)
def test_what_cannot_be_coded_is_refused_before_the_model_is_read(
    arguments: tuple[Any, ...], message: str, tmp_path: Path, command: Command
) -> None:
    status, out, error = command(
        "calibrate", tmp_path / "no-model", "--output", tmp_path / "out", *arguments
    )
    assert (status, out) == (2, "")
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_ratio_out_of_reach_is_refused_before_the_text_is_read(
    make_model: Callable[..., Path], tmp_path: Path, command: Command
) -> None:
    options = ("--kv-ratio", 0.05, "--text", tmp_path / "none.txt")
    model = make_model("llama", **LLAMA)
    for extra in ((), ("--dry-run",)):
        arguments = ("--output", tmp_path / "out", *options, *extra)
        status, out, error = command("calibrate", model, *arguments)
        assert (status, out) == (2, "")
        assert "--kv-ratio 0.05 is out of reach; ask for at least" in error.splitlines()[-1]


def test_the_dry_run_foretells_the_bytes(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    eigen, _ = calibrated(make_model, text_file, tmp_path / "out", command)
    arguments = ("--output", tmp_path / "other", "--dry-run", "--kv-ratio")
    for ratio, expected in ((0.4, 0.4), (0.9, (8 * 64 + 16) / (16 * 64))):
        status, out, error = command("calibrate", tmp_path / "model", *arguments, ratio)
        assert status == 0, error
        lines = dict(line.split(None, 1) for line in out.splitlines())
        found, full = (int(word) for word in re.findall(r"(\d+) of (\d+)", lines["bytes"])[0])
        assert full == eigen.uncompressed_bytes_per_token(2)
        assert found == pytest.approx(expected * full, abs=2)
        if ratio == 0.4:
            assert 0.9 * found <= eigen.bytes_per_token(2) <= found


def test_other_head_sizes_are_refused_before_the_text_is_read(
    make_model: Callable[..., Path], tmp_path: Path, command: Command
) -> None:
    options = ("--kv-ratio", 0.4, "--text", tmp_path / "none.txt")
    model = make_model("llama", head_dim=6)
    status, _, error = command("calibrate", model, "--output", tmp_path / "out", *options)
    assert status == 2
    assert "head size of 6" in error.splitlines()[-1]


def test_full_ratio_keeps_16_bits(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    options = ("--text", text_file, *SMALL, "--kv-ratio", 1)
    status, _, error = command(
        "calibrate", make_model("llama"), "--output", tmp_path / "out", *options
    )
    assert status == 0, error
    assert validate(tmp_path / "out").kv_ratio == 1
