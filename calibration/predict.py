"""`--dry-run`: what a calibration would give and cost, from the configuration alone.

Needs neither weights nor text: parameter counts come from a model without storage, the speed
from a short matrix product on the device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from calibration import refit, scales
from calibration.methods.base import Method
from calibration.probe import SHARES, TOKENS
from calibration.source import Source
from calibration.stream import BATCH_TOKENS, SPILL_LIMIT, auto_config, auto_model
from vllm_eigen.families import KeyMode

_RESIDENT = {"cpu": 450 << 20, "cuda": 1200 << 20}
"""Bytes that Python, torch and transformers take before anything is loaded."""
_OVERHEAD_SECONDS = 8.0
"""Imports, tokenizing, writing: what a calibration takes however small the model."""
_HELD_OUT = 8
"""Windows that the result is measured on."""
_EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a layer reaches."""


@dataclass(frozen=True)
class Prediction:
    """What to expect.

    Attributes:
        kv_ratio: None where the error budget decides it.
        bytes_per_token: KV cache at the model's element type, None likewise.
        uncompressed_bytes_per_token: the same of the base model.
        tokens_per_gib: tokens a GiB of KV cache holds, None likewise.
        peak_memory_bytes: resident memory of the process (on the GPU for cuda).
        disk_bytes: the checkpoint, the state for --resume and spilled activations.
        seconds: an estimate within a factor of two or so.
    """

    kv_ratio: float | None
    bytes_per_token: int | None
    uncompressed_bytes_per_token: int
    tokens_per_gib: int | None
    peak_memory_bytes: int
    disk_bytes: int
    seconds: float


def predict(
    source: Source,
    method: Method,
    *,
    kv_ratio: float | None,
    samples: int,
    length: int,
    key_mode: KeyMode,
    head_group: int,
    device: torch.device,
) -> Prediction:
    """Predict one calibration.

    Raises:
        InputError: the configuration is not usable.
    """
    geometry = source.geometry
    with torch.device("meta"):
        model = auto_model(auto_config(source), eager=False)
    layers = model.get_submodule(source.family.decoder).get_submodule(source.family.layers)
    layer = max(sum(p.numel() for p in item.parameters()) for item in layers)
    total = sum(p.numel() for p in model.parameters())
    outside = total - sum(p.numel() for p in layers.parameters())
    element = 4 if str(_dtype(source)) == "float32" else 2
    full = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_size
    kept = None
    if kv_ratio is not None:
        parts = 2 * geometry.num_layers
        heads = geometry.num_kv_heads // head_group
        kept = max(round(kv_ratio * full / heads), parts) * heads

    length = min(length, source.max_positions)
    tokens = samples * length
    hidden = tokens * geometry.hidden_size * 4
    probing = kv_ratio is not None and method.rank_rule == "global"
    trials = 2 * len(SHARES) * geometry.num_layers if probing else 0
    # Every trial has hidden states of its own, once those of the text are gone.
    activations = hidden, trials * TOKENS * geometry.hidden_size * 4
    spilled = max((size for size in activations if size > SPILL_LIMIT), default=0)
    kept_hidden = max((size for size in activations if size <= SPILL_LIMIT), default=0)
    if device.type == "cuda":
        kept_hidden = 0  # they wait in the host's memory
    statistics = method.statistics(key_mode, head_group)
    moments = sum(_product(item().shape(geometry)) for item in statistics) * 8
    bases = 4 * geometry.num_layers * geometry.num_kv_heads * head_group * geometry.head_size**2 * 8
    batch = max(1, BATCH_TOKENS[device.type] // length)
    eager = any(item.needs_probabilities for item in statistics)
    scores = (4 if eager else 1) * batch * geometry.num_heads * length * length * 4
    widest = 8 * batch * length * max(geometry.hidden_size, layer // geometry.hidden_size // 3) * 4
    peak = _RESIDENT[device.type] + 4 * (outside + layer) + 3 * moments + bases + widest
    peak += (scores if eager or source.family.qkv_proj else 0) + kept_hidden

    # A trial joins at its layer, the middle one on average; the paper's sweep takes one layer each.
    probes = trials * (geometry.num_layers + 1) / (2 * geometry.num_layers) if probing else 14.0
    # After the ranks: the refit's passes, some windows for the scales, the held-out ones twice.
    refits = method.refit and (kv_ratio is None or kv_ratio < 1)
    after = 3 * min(tokens, refit.TOKENS * geometry.hidden_size) * refits
    after += min(tokens, max(scales.TOKENS, length)) + 2 * _HELD_OUT * length
    flops = 2.0 * (total - outside) * (tokens + probes * TOKENS + after)
    flops += 4.0 * geometry.num_layers * tokens * length * geometry.num_heads * geometry.head_size
    speed = _EFFICIENCY * _flops_per_second(device)
    return Prediction(
        kv_ratio=None if kept is None else kept / full,
        bytes_per_token=None if kept is None else kept * element,
        uncompressed_bytes_per_token=full * element,
        tokens_per_gib=None if kept is None else (1 << 30) // (kept * element),
        peak_memory_bytes=peak,
        disk_bytes=total * element + bases + spilled,
        seconds=_OVERHEAD_SECONDS + flops / speed,
    )


def _dtype(source: Source) -> Any:
    return source.config.get("dtype") or source.config.get("torch_dtype") or "float16"


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _flops_per_second(device: torch.device) -> float:
    """Of a large product, at its best: other work on the machine must not count."""
    size = 4096 if device.type == "cuda" else 512
    x = torch.randn(size, size, device=device)
    float((x @ x)[0, 0])
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.2:
        begun = time.perf_counter()
        y = x @ x
        float(y[0, 0])  # waits for the device
        times.append(time.perf_counter() - begun)
    return 2.0 * size**3 / min(times)
