# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of `vllm-eigen calibrate` on random models: part of `bench calibration`.

One of layers, width and samples changes at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_eigen.benchmarks.calibration.child import calibrate
from vllm_eigen.benchmarks.calibration.random_model import (
    WORDS,
    layer_parameters,
    save_model,
    words,
)
from vllm_eigen.common.progress import Reporter

LAYERS = (4, 8, 16, 32)
WIDTHS = (256, 512, 1024)
SAMPLES = (8, 32, 128)
LENGTH = 256
TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True)
class CostRow:
    """One calibration.

    Attributes:
        layer_bytes: float32 parameters of one decoder layer; `model_bytes` of all of them.
        seconds: of the whole command, imports included.
        peak_bytes: largest resident memory of the process.
    """

    varies: str
    layers: int
    width: int
    samples: int
    layer_bytes: int
    model_bytes: int
    seconds: float
    peak_bytes: int


def measure_cost(reporter: Reporter) -> list[CostRow]:
    """Rows of all sizes.

    Raises:
        EngineError: a calibration failed.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = list(_sizes())
        reporter.stage("cost", len(sizes))
        known: dict[tuple[int, int, int], CostRow] = {}
        for varies, *size in sizes:
            layers, width, samples = key = (size[0], size[1], size[2])
            if key not in known:
                row = known[key] = _row(folder, varies, layers, width, samples)
                reporter.note(
                    f"{layers} layers of {width}, {samples} windows: {row.seconds:.1f} s, "
                    f"{row.peak_bytes / 2**20:.0f} MiB"
                )
            rows.append(replace(known[key], varies=varies))
            reporter.step()
    return rows


def _sizes() -> Iterator[tuple[str, int, int, int]]:
    for layers in LAYERS:
        yield "layers", layers, WIDTHS[0], SAMPLES[1]
    for width in WIDTHS:
        yield "width", LAYERS[1], width, SAMPLES[1]
    for samples in SAMPLES:
        yield "samples", LAYERS[1], WIDTHS[0], samples


def _row(folder: Path, varies: str, layers: int, width: int, samples: int) -> CostRow:
    model = folder / f"{layers}-{width}"
    config = _config(layers, width)
    if not model.exists():
        save_model(model, config)
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(words(2 * LENGTH * max(SAMPLES)), encoding="utf-8")
    options = ["--output", str(model) + "-out", "--overwrite", "--kv-ratio", "0.6"]
    options += ["--text", str(text), "--samples", str(samples), "--seq-len", str(LENGTH)]
    found = calibrate(model, options, cache=folder / "cache", timeout=TIMEOUT_SECONDS)
    layer = 4 * layer_parameters(config)
    return CostRow(
        varies, layers, width, samples, layer, layers * layer, found.seconds, found.peak_bytes
    )


def _config(layers: int, width: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": WORDS + 2,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 128),
        "max_position_embeddings": LENGTH,
    }
