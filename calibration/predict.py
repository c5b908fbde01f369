# SPDX-License-Identifier: Apache-2.0
"""`--dry-run`: what a calibration would give and cost, from the configuration alone.

Needs neither weights nor text: parameter counts come from a model without storage, the speed
from a short matrix product on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_eigen.calibration.allocation.probe import SHARES, TOKENS
from vllm_eigen.calibration.coding.budget import bytes_for, most_bytes
from vllm_eigen.calibration.export import refit, scales
from vllm_eigen.calibration.gradient_cost import GradientCost, gradient_cost
from vllm_eigen.calibration.job import recipe_of
from vllm_eigen.calibration.model.activations import MEMORY_LIMIT
from vllm_eigen.calibration.model.device import BATCH_TOKENS, multiplies_bfloat16, pick_device
from vllm_eigen.calibration.model.source import Source, open_source
from vllm_eigen.calibration.model.transformers_model import auto_config, auto_model
from vllm_eigen.calibration.options import HELD_OUT, Options

_RESIDENT = {"cpu": 650 << 20, "cuda": 1200 << 20}
"""Bytes that Python, torch, transformers and a tokenizer take before weights are loaded."""
_OVERHEAD_SECONDS = 8.0
"""Imports, tokenizing, writing: what a calibration takes however small the model."""
_EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a layer reaches."""
_ATTENTION_EFFICIENCY = 0.35
"""The same of attention, forward and backward, counting what lies before the diagonal."""


@dataclass(frozen=True)
class Prediction:
    """What to expect.

    Attributes:
        layers, kept_layers: that are compressed, and that stay as the base model has them.
        kv_ratio: of the layers that are compressed, as the bytes below are; None where the error
            budget decides it.
        bytes_per_token: KV cache at the model's element type, of coded latents the most that the
            ratio allows; None likewise.
        uncompressed_bytes_per_token: the same of the base model.
        tokens_per_gib: tokens a GiB of KV cache holds, None likewise.
        peak_memory_bytes: resident memory of the process (on the GPU for cuda).
        disk_bytes: the checkpoint, the state for --resume and memory-mapped activations.
        seconds: an estimate within a factor of two or so.
    """

    layers: int
    kept_layers: int
    kv_ratio: float | None
    bytes_per_token: int | None
    uncompressed_bytes_per_token: int
    tokens_per_gib: int | None
    peak_memory_bytes: int
    disk_bytes: int
    seconds: float


def predict(options: Options) -> Prediction:
    """Predict what `pipeline.calibrate` would give and cost.

    Raises:
        UsageError, InputError, OutputError: what it would refuse for the configuration alone.
    """
    options.check()
    device = pick_device(options.device)
    source = open_source(options.model, revision=options.revision, with_weights=False)
    recipe = recipe_of(options, source)
    geometry, kv_ratio = source.geometry, options.target.kv_ratio
    with torch.device("meta"):
        model = auto_model(auto_config(source), eager=False)
    layers = model.get_submodule(source.family.decoder).get_submodule(source.family.layers)
    layer = max(sum(p.numel() for p in item.parameters()) for item in layers)
    multiplied = [_multiplied(item, source.config) for item in layers]
    total = sum(p.numel() for p in model.parameters())
    outside = total - sum(p.numel() for p in layers.parameters())
    element = 4 if str(_dtype(source)) == "float32" else 2
    count = len(source.family.compressed_layers(source.config))
    full = 2 * count * geometry.num_kv_heads * geometry.head_size
    cached = 2 if recipe.coded else element  # codes are compared with 16 bits
    kept = None
    if recipe.coded:
        most = most_bytes(geometry.head_size)
        budget = min(bytes_for(options.target.ratio_of_coded(), geometry.head_size), most)
        kept = int(budget * count) * geometry.num_kv_heads
    elif kv_ratio is not None:
        parts = 2 * count
        heads = geometry.num_kv_heads // recipe.head_group
        kept = max(round(kv_ratio * full / heads), parts) * heads * cached

    length = min(options.length, source.max_positions)
    tokens = options.samples * length
    hidden = tokens * geometry.hidden_size * 4
    rule = recipe.rank_rule
    probing = kv_ratio is not None and rule is not None and rule.measures_losses
    trials = 2 * len(SHARES) * count if probing else 0
    # Every trial has hidden states of its own, once those of the text are gone.
    activations = hidden, trials * TOKENS * geometry.hidden_size * 4
    mapped = max((size for size in activations if size > MEMORY_LIMIT), default=0)
    kept_hidden = max((size for size in activations if size <= MEMORY_LIMIT), default=0)
    gradients = None
    if recipe.uses_gradients:
        gradients = gradient_cost(
            geometry,
            layer_parameters=max(multiplied),
            head_parameters=geometry.hidden_size * source.vocab_size,
            tokens=tokens,
            length=length,
            memory_limit=MEMORY_LIMIT if options.memory_limit is None else options.memory_limit,
        )
        kept_hidden, mapped = gradients.memory_bytes, gradients.disk_bytes
    weights = 4 * (outside + layer)
    if device.type == "cuda":
        kept_hidden = 0  # they wait in the host's memory
    elif element == 2:
        weights += 2 * (outside + layer)  # the mapped file that they are converted from
    moments = sum(math.prod(item.shape(geometry)) for item in recipe.statistics) * 8
    bases = 4 * count * geometry.num_kv_heads * recipe.head_group * geometry.head_size**2 * 8
    batch = max(1, BATCH_TOKENS[device.type] // length)
    eager = recipe.needs_probabilities
    scores = (4 if eager else 1) * batch * geometry.num_heads * length * length * 4
    widest = 8 * batch * length * max(geometry.hidden_size, layer // geometry.hidden_size // 3) * 4
    peak = _RESIDENT[device.type] + weights + 3 * moments + bases + widest
    peak += (scores if eager or source.family.eager_only else 0) + kept_hidden

    # A trial joins at its layer, the middle one on average; the error grid takes one layer each.
    probes = trials * (geometry.num_layers + 1) / (2 * geometry.num_layers) if probing else 14.0
    if recipe.uses_gradients:
        probes = 0.0
    # After the ranks: the refit's passes, some windows for the scales, the held-out ones twice.
    after = 3 * min(tokens, refit.TOKENS * geometry.hidden_size) * recipe.refit
    after += min(tokens, max(scales.TOKENS, length)) + 2 * HELD_OUT * length
    passed = probes * TOKENS + after + (0 if gradients else tokens)
    flops = 2.0 * sum(multiplied) * passed
    flops += 4.0 * geometry.num_layers * passed * length * geometry.num_heads * geometry.head_size
    speed = _flops_per_second(device, torch.float32)
    seconds = _OVERHEAD_SECONDS + flops / (_EFFICIENCY * speed)
    if gradients is not None:
        seconds += _gradient_seconds(gradients, device, speed)
    return Prediction(
        layers=count,
        kept_layers=geometry.num_layers - count,
        kv_ratio=None if kept is None else kept / (full * cached),
        bytes_per_token=kept,
        uncompressed_bytes_per_token=full * cached,
        tokens_per_gib=None if kept is None else (1 << 30) // kept,
        peak_memory_bytes=peak,
        disk_bytes=total * element + bases + mapped,
        seconds=seconds,
    )


def _multiplied(layer: nn.Module, config: Mapping[str, Any]) -> int:
    """Parameters of a layer that a token meets: of its experts, those that the router picks."""
    named = [(name, p.numel()) for name, p in layer.named_parameters()]
    experts = sum(size for name, size in named if ".experts." in name)
    count = config.get("num_local_experts") or config.get("num_experts") or 1
    picked = config.get("num_experts_per_tok") or 1
    return sum(size for _, size in named) - experts + experts * int(picked) // int(count)


def _dtype(source: Source) -> Any:
    return source.config.get("dtype") or source.config.get("torch_dtype") or "float16"


def _gradient_seconds(cost: GradientCost, device: torch.device, speed: float) -> float:
    layers = speed
    if multiplies_bfloat16(device):
        layers = _flops_per_second(device, torch.bfloat16)
    seconds = cost.layer_flops / (_EFFICIENCY * layers)
    seconds += cost.attention_flops / (_ATTENTION_EFFICIENCY * speed)
    return seconds + cost.head_flops / (_EFFICIENCY * speed)


def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of a large product, at its best: other work on the machine must not count.

    On a machine with other work most products are interrupted, so that the best is one of many.
    """
    size = 4096 if device.type == "cuda" else 512
    x = torch.randn(size, size, device=device, dtype=dtype)
    float((x @ x)[0, 0])
    times: list[float] = []
    while len(times) < 3 or (len(times) < 100 and sum(times) < 2.0):
        begun = time.perf_counter()
        y = x @ x
        float(y[0, 0])  # waits for the device
        times.append(time.perf_counter() - begun)
    return 2.0 * size**3 / min(times)
