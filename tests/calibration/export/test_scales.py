# SPDX-License-Identifier: Apache-2.0
"""Scales of an fp8 cache and the rounding that `evaluate --kv-cache-dtype fp8` simulates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.tiny import build_model, save_model
from vllm_eigen.calibration.export.scales import MARGIN, fp8_cache
from vllm_eigen.calibration.model.compressed import CompressedModel, load_reference
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.model.text import read_files, sample_windows
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.checkpoint.validate import validate

Command = Callable[..., tuple[int, str, str]]
CASES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("opt", (), {}),
    ("opt", ("--head-group", 2), {}),
    ("mpt", (), {}),
    ("mpt", (), {"attn_config": {"clip_qkv": 0.8}}),
    ("llama", ("--head-group", 2), {}),
    ("llama", ("--key-cache", "post-rope"), {}),
    ("qwen3", (), {}),
]


def e4m3(value: float) -> float:
    """Nearest float8_e4m3 by arithmetic: 3 bits of mantissa, exponents from -6, at most 448."""
    if value == 0:
        return 0.0
    exponent = max(-6, math.floor(math.log2(abs(value))))
    step = 2.0 ** (exponent - 3)
    return max(-448.0, min(448.0, round(value / step) * step))  # round() takes ties to even too


def test_rounding_is_that_of_e4m3() -> None:
    ranks = LayerRanks(rank_k=1, rank_v=1, k_scale=0.25, v_scale=3.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator) * torch.logspace(-5, 4, 2000)
    for part, scale in (("key", 0.25), ("value", 3.0)):
        got = fp8_cache(ranks)(part, x)  # type: ignore[arg-type]
        scaled = (x / scale).tolist()
        expected = torch.tensor([e4m3(value) for value in scaled]) * scale
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def calibrated(
    kind: str, options: tuple[Any, ...], make: Any, text: Path, command: Command, **changes: Any
) -> Path:
    """A checkpoint of a tiny model at half the bytes, with latents of 16 bits."""
    model = make(kind, **changes)
    output = model.with_name("out")
    arguments = ("--output", output, "--kv-ratio", 0.5, "--samples", 12, "--seq-len", 24)
    arguments = (*arguments, "--method", "sensitivity", "--text", text)
    status, _, error = command("calibrate", model, *arguments, *options)
    assert status == 0, error
    return output


@pytest.mark.parametrize(("kind", "options", "changes"), CASES, ids=str)
def test_latents_of_the_calibration_text_just_fit(
    kind: str,
    options: tuple[Any, ...],
    changes: dict[str, Any],
    make_model: Callable[..., Path],
    text_file: Path,
    command: Command,
) -> None:
    output = calibrated(kind, options, make_model, text_file, command, **changes)
    eigen, model = validate(output), CompressedModel(output)
    source = open_source(str(output.with_name("model")))
    windows = sample_windows(
        read_files([text_file]), source.tokenizer(), samples=12, length=24, seed=0,
        vocab_size=source.vocab_size, held_out=8,
    ).chosen  # fmt: skip
    seen: list[dict[str, float]] = [{} for _ in model.layers]
    for layer, found in zip(model.layers, seen, strict=True):
        layer.cache = lambda part, x, found=found: found.update({part: float(x.abs().max())}) or x  # type: ignore[misc]
    with torch.no_grad():
        got = model.model(windows).logits
        expected = load_reference(output)(windows).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    for layer, found in zip(eigen.layers, seen, strict=True):
        room = MARGIN * (2**0.5 if eigen.key_mode.caches_rotated_keys else 1.0)
        assert room * found["key"] / 448 == pytest.approx(layer.k_scale, rel=1e-3)
        assert MARGIN * found["value"] / 448 == pytest.approx(layer.v_scale, rel=1e-3)


def test_rotated_keys_of_later_positions_fit(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    model = build_model("llama", attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            # One slow RoPE pair (2, 6) of every head, which no calibration window turns far.
            layer.self_attn.k_proj.bias.view(2, 8)[:, [2, 6]] = 50.0
    base, output = save_model(model, tmp_path / "base"), tmp_path / "out"
    arguments = ("--output", output, "--kv-ratio", 1.0, "--samples", 12, "--seq-len", 8)
    options = ("--text", text_file, "--method", "paper", "--key-cache", "post-rope")
    status, _, error = command("calibrate", base, *arguments, *options)
    assert status == 0, error
    tokens = torch.randint(3, 60, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    for layer, ranks in zip(cache.layers, validate(output).layers, strict=True):
        assert float(layer.keys.abs().max()) <= 448 * ranks.k_scale


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_evaluate_rounds_the_cache_and_only_that(
    kind: str, make_model: Callable[..., Path], text_file: Path, command: Command
) -> None:
    output = calibrated(kind, (), make_model, text_file, command)
    results = {}
    for dtype in ("auto", "fp8"):
        arguments = ("--text", text_file, "--json", "--kv-cache-dtype", dtype)
        status, out, error = command("evaluate", output, *arguments)
        assert status == 0, error
        results[dtype] = json.loads(out)
    assert [results[name]["kv_cache_dtype"] for name in ("auto", "fp8")] == ["auto", "fp8"]
    assert results["fp8"]["base"] == results["auto"]["base"]
    eigen, rounded = (results[name]["eigen"]["perplexity"] for name in ("auto", "fp8"))
    assert eigen != rounded
    assert rounded == pytest.approx(eigen, rel=0.05)


def test_folded_keys_are_rounded_where_the_cache_holds_them(
    make_model: Callable[..., Path], text_file: Path, command: Command
) -> None:
    """OPT's latents are the padded keys of the reference: round those by hand."""
    output = calibrated("opt", (), make_model, text_file, command)
    by_hand = load_reference(output)
    for layer, ranks in zip(by_hand.model.decoder.layers, validate(output).layers, strict=True):
        for name, scale in (("k_proj", ranks.k_scale), ("v_proj", ranks.v_scale)):

            def through(module: Any, args: Any, x: torch.Tensor, scale: float = scale) -> Any:
                stored = [e4m3(value / scale) * scale for value in x.flatten().tolist()]
                return torch.tensor(stored).reshape(x.shape)

            getattr(layer.self_attn, name).register_forward_hook(through)
    tokens = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = by_hand(tokens).logits
        got = load_reference(output, cache=fp8_cache)(tokens).logits
        exact = load_reference(output)(tokens).logits
    assert float((got - expected).abs().max()) < 0.05 * float((exact - expected).abs().max())
