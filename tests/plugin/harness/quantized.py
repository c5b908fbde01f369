# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest quantized checkpoints in the formats vLLM's CPU build runs (fp8 is not one).

Each writer replaces the decoder's linear weights and returns the `quantization_config` that vLLM
reads; `rounded` gives back the weights as the format stores them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
Tensors = dict[str, torch.Tensor]


def quantize(base: Path, output: Path, form: str) -> tuple[Path, Tensors]:
    """Write a quantized copy of a Llama; also returns the weights it stands for, by name."""
    pack, settings = FORMATS[form]
    output.mkdir()
    tensors: Tensors = {}
    rounded: Tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if ".layers." not in name or tensor.ndim != 2:
            tensors[name] = tensor
            continue
        packed, rounded[name] = pack(tensor.float())
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": value.contiguous() for part, value in packed.items()}
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = settings
    (output / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    for path in base.glob("token*"):
        (output / path.name).write_bytes(path.read_bytes())
    return output, rounded


def _int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored = (weight / scale).round().to(torch.int8)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def _grouped(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0..15 around 8 [inputs, outputs], scales [groups, outputs], rounded weights."""
    groups = weight.mT.reshape(-1, GROUP, weight.shape[0])
    scale = (groups.abs().amax(1, keepdim=True) / 7).to(torch.bfloat16).float()
    codes = (groups / scale).round().clamp(-8, 7)
    rounded = (codes * scale).reshape(weight.mT.shape).mT
    return (codes + 8).int().reshape(weight.mT.shape), scale[:, 0], rounded


def _packed(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight 4-bit codes of the last dimension in each int32, `order[i]` at bits 4i."""
    eights = codes.unflatten(-1, (-1, 8))[..., list(order)].to(torch.int64)
    word = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scale, rounded = _grouped(weight)
    zeros = torch.full_like(scale, 7, dtype=torch.int32)  # Stored one too small, by convention.
    return {
        "qweight": _packed(codes.mT).mT,
        "qzeros": _packed(zeros),
        "scales": scale.to(torch.bfloat16),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }, rounded


def _awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scale, rounded = _grouped(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": _packed(codes, order),
        "qzeros": _packed(torch.full_like(scale, 8, dtype=torch.int32), order),
        "scales": scale.to(torch.bfloat16),
    }, rounded


_INT8_GROUPS = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    "input_activations": {
        "num_bits": 8,
        "type": "int",
        "strategy": "token",
        "dynamic": True,
        "symmetric": True,
    },
}
FORMATS: dict[str, tuple[Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]], Any]] = {
    "compressed-tensors": (
        _int8,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": _INT8_GROUPS},
            "ignore": ["lm_head"],
        },
    ),
    "gptq": (
        _gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "awq": (
        _awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True},
    ),
}
