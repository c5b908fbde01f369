# SPDX-License-Identifier: Apache-2.0
"""Refitted output projections: the regression is the best there is, the checkpoint carries it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_eigen.calibration.export.regress import Regression, Sums
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.model.text import read_files, sample_windows
from vllm_eigen.calibration.options import HELD_OUT
from vllm_eigen.checkpoint.validate import validate

Command = Callable[..., tuple[int, str, str]]
SMALL = ("--samples", 12, "--seq-len", 24, "--method", "sensitivity")


def _problem(heads: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Regression]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = normal(60, heads * size) @ normal(heads * size, heads * size)
    targets = features @ normal(heads * size, 7) + normal(60, 7)
    gram = (features.mT @ features).reshape(heads, size, heads, size)
    return features, targets, Regression(gram, (features.mT @ targets).reshape(heads, size, 7))


def _error(
    features: torch.Tensor, targets: torch.Tensor, encoders: torch.Tensor, decoders: torch.Tensor
) -> float:
    return float((targets - features @ (encoders @ decoders).flatten(0, 1)).square().sum())


def test_decoders_are_least_squares() -> None:
    features, targets, problem = _problem(3, 5)
    encoders = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1)).double()
    latents = features @ torch.block_diag(*encoders)
    expected = torch.linalg.lstsq(latents, targets).solution
    torch.testing.assert_close(problem.decoders(encoders).flatten(0, 1), expected)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_one_head_is_the_classic_reduced_rank_regression(rank: int) -> None:
    """The least error is that of least squares plus the tail of what least squares predicts."""
    features, targets, problem = _problem(1, 6)
    fitted = features @ torch.linalg.lstsq(features, targets).solution
    tail = torch.linalg.svdvals(fitted)[rank:].square().sum()
    best = float((targets - fitted).square().sum() + tail)
    start = torch.eye(6, dtype=torch.float64)[None, :, :rank]
    found = _error(features, targets, *problem.sweep(start, problem.decoders(start)))
    assert found == pytest.approx(best, rel=1e-9)


def test_sweeps_never_raise_the_error() -> None:
    features, targets, problem = _problem(4, 5)
    encoders = torch.eye(5, dtype=torch.float64)[None, :, :2].expand(4, -1, -1)
    decoders = problem.decoders(encoders)
    errors = [_error(features, targets, encoders, decoders)]
    for _ in range(5):
        encoders, decoders = problem.sweep(encoders, decoders)
        errors.append(_error(features, targets, encoders, decoders))
    assert errors[1] < 0.95 * errors[0]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))


def test_the_ridge_holds_what_the_text_does_not_decide() -> None:
    _, _, problem = _problem(2, 4)
    weights = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2)).double()
    unit = torch.eye(4, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(
        problem.with_ridge(weights, 1e9).decoders(unit), weights, atol=1e-5, rtol=0
    )
    nothing = Regression(torch.zeros(2, 4, 2, 4).double(), torch.zeros(2, 4, 7).double())
    torch.testing.assert_close(nothing.with_ridge(weights, 1e-3).decoders(unit), weights)


def test_sums_give_weighted_least_squares_with_a_bias() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(50, 6, generator=generator, dtype=torch.float64) + 2
    targets = torch.randn(50, 4, generator=generator, dtype=torch.float64) - 1
    weights = 10 ** torch.randn(50, generator=generator, dtype=torch.float64)
    sums = Sums(6, 4, torch.device("cpu"))
    for part in (slice(0, 20), slice(20, 50)):
        sums.add(features[None, part], targets[None, part], weights[None, part])
    sums = sums.centred()
    problem = Regression(sums.gram.reshape(1, 6, 1, 6), sums.cross[None])
    found = problem.decoders(torch.eye(6, dtype=torch.float64)[None])[0]
    bias = sums.target_mean - sums.feature_mean @ found
    rows = torch.cat([features, torch.ones(50, 1, dtype=torch.float64)], 1)
    root = weights.sqrt()[:, None]
    expected = torch.linalg.lstsq(rows * root, targets * root).solution
    torch.testing.assert_close(torch.cat([found, bias[None]]), expected)
    assert sums.tokens == 50


def _nll(model: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


# transformers insists on Qwen's own tokenizer for Qwen2, which knows none of the tiny text.
@pytest.mark.parametrize("kind", ["llama", "mpt", "opt", "phi3", "qwen3"])
def test_the_checkpoint_is_what_was_measured(
    kind: str,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    """Streamed with hooks, and read back from its files: the same model, better than without."""
    model = make_model(kind)
    source = open_source(str(model))
    windows = sample_windows(
        read_files([text_file]),
        source.tokenizer(),
        samples=12,
        length=24,
        seed=0,
        vocab_size=source.vocab_size,
        held_out=HELD_OUT,
    )
    arguments = ("calibrate", model, "--kv-ratio", 0.4, "--text", text_file, *SMALL)
    distance = {}
    base = load_logits(model, windows.chosen)
    for option in ("--refit", "--no-refit"):
        output = tmp_path / option.strip("-")
        status, _, error = command(*arguments, "--output", output, option)
        assert status == 0, error
        record = validate(output).provenance
        assert record["calibration"]["refit"] is (option == "--refit")
        reference = load_reference(output)
        measured = torch.tensor(record["measured"]["eigen_perplexity"]).log()
        assert _nll(reference, windows.held_out) == pytest.approx(float(measured), rel=1e-4)
        with torch.no_grad():
            logits = reference(windows.chosen, use_cache=False).logits
        distance[option] = float((logits - base).square().mean())
    assert distance["--refit"] < 0.9 * distance["--no-refit"]


def load_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What the base model says."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("method", ["paper", "sensitivity"])
def test_only_layers_that_lose_something_change(
    method: str, make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    model, ranks, output = make_model("llama"), tmp_path / "ranks.json", tmp_path / "out"
    ranks.write_text(json.dumps([[8, 8], [3, 8]]))
    options = ("--ranks", ranks, "--text", text_file, *SMALL, "--method", method, "--refit")
    status, _, error = command("calibrate", model, "--output", output, *options)
    assert status == 0, error
    base, found = load_file(model / "model.safetensors"), load_file(output / "model.safetensors")
    names = [f"model.layers.{index}.self_attn.o_proj.weight" for index in range(2)]
    assert torch.equal(base[names[0]], found[names[0]])
    assert not torch.equal(base[names[1]], found[names[1]])


def test_published_methods_and_bases_alone_stay_as_they_are(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    model = make_model("llama")
    options = ("--kv-ratio", 0.5, "--text", text_file, *SMALL)
    for number, extra in enumerate((("--method", "paper"), ("--bases-only",))):
        output = tmp_path / f"out{number}"
        assert command("calibrate", model, "--output", output, *options, *extra)[0] == 0
        card = (output / "README.md").read_text()
        assert "refit: False" in card
    output = tmp_path / "refused"
    refused = command("calibrate", model, "--output", output, *options, "--bases-only", "--refit")
    assert refused[0] != 0
    assert "drop one of them" in refused[2]
    assert not output.exists()
