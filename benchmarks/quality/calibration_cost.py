# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of `vllm-eigen calibrate` on random models: part of `bench calibration`.

One of layers, width and samples changes at a time. Each calibration is a process of its own, whose
peak of resident memory the kernel reports.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_eigen.common.errors import EngineError
from vllm_eigen.common.progress import Reporter

LAYERS = (4, 8, 16, 32)
WIDTHS = (256, 512, 1024)
SAMPLES = (8, 32, 128)
LENGTH = 256
TIMEOUT_SECONDS = 900.0
_WORDS = 1000

_CHILD = """
import re, sys, time
from vllm_eigen.cli import main
status = main(sys.argv[1:])
found = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(f"peak {int(found[1]) * 1024}")
sys.exit(status)
"""


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
    layer_bytes = _model(model, layers, width)
    text = folder / "text.txt"
    if not text.exists():
        words = " ".join(f"w{(n * n + n // 7) % _WORDS}" for n in range(2 * LENGTH * max(SAMPLES)))
        text.write_text(words, encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        _CHILD,
        "calibrate",
        str(model),
        "--output",
        str(model) + "-out",
    ]
    command += ["--kv-ratio", "0.6", "--text", str(text), "--samples", str(samples)]
    command += ["--seq-len", str(LENGTH), "--overwrite", "--quiet"]
    began = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "EIGEN_CACHE": str(folder / "cache")},
    )
    seconds = time.monotonic() - began
    found = re.search(r"peak (\d+)", done.stdout)
    if done.returncode or found is None:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise EngineError(f"calibrating {layers} layers of {width} failed: {reason}")
    return CostRow(
        varies, layers, width, samples, layer_bytes, layers * layer_bytes, round(seconds, 2),
        int(found[1]),
    )  # fmt: skip


def _model(folder: Path, layers: int, width: int) -> int:
    """Save a random Llama unless it is there; returns the bytes of a layer in float32."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=_WORDS + 2,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    layer = 4 * sum(int(item.numel()) for item in model.model.layers[0].parameters())
    if not folder.exists():
        model.save_pretrained(folder)
        vocabulary = {"</s>": 0, "<unk>": 1} | {f"w{n}": n + 2 for n in range(_WORDS)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
        ).save_pretrained(folder)
    return layer
