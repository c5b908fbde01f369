# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench capacity`: users that a GPU holds, by model, KV ratio and cache type.

Pure arithmetic, the same as `vllm-eigen estimate`; no model is loaded and nothing is measured. The
models' sizes are those of `benchmarks.lib.shapes`. `docs/capacity.md` is what it writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_eigen.benchmarks.lib.markdown import table
from vllm_eigen.benchmarks.lib.shapes import SHAPES
from vllm_eigen.common.errors import UsageError

HELP = "table of the users a GPU holds, by model, KV ratio and cache type; measures nothing"
CONTEXT = 8192
"""Tokens of one user."""
UTILIZATION = 0.92
"""vLLM's default share of the GPU."""
WORKSPACE = 2 << 30
"""Bytes a GPU set aside for activations and CUDA graphs."""
RATIOS = (None, 0.6, 0.4)
CACHE_TYPES = ("bfloat16", "fp8")
CODED_BITS = (4, 3)
"""Of coded latents at full rank."""


@dataclass(frozen=True)
class Device:
    """One GPU or several of a kind; memory in MiB of one, as its driver reports it."""

    name: str
    mebibytes: int
    count: int = 1

    @property
    def budget(self) -> int:
        """Bytes for weights and KV cache, on all of them together."""
        return self.count * (int((self.mebibytes << 20) * UTILIZATION) - WORKSPACE)


SMALL = Device("24 GB (RTX 4090)", 24564)
MEDIUM = Device("48 GB (L40S)", 46068)
LARGE = Device("80 GB (H100)", 81559)
LARGEST = Device("141 GB (H200)", 143771)
SINGLE = (SMALL, MEDIUM, LARGE, LARGEST)
SEVERAL = (Device("2 x 80 GB (H100)", 81559, 2), Device("4 x 80 GB (H100)", 81559, 4))


MODELS: dict[str, tuple[Mapping[str, Any], tuple[Device, ...]]] = {
    "Mistral-7B-v0.3": (SHAPES["Mistral-7B-v0.3"], SINGLE),
    "Qwen2.5-7B": (SHAPES["Qwen2.5-7B"], SINGLE),
    "Llama-3.1-8B": (SHAPES["Llama-3.1-8B"], SINGLE),
    "Qwen3-8B": (SHAPES["Qwen3-8B"], SINGLE),
    "OPT-30B": (SHAPES["OPT-30B"], SINGLE),
    "Llama-3.1-70B": (
        SHAPES["Llama-3.1-70B"],
        (*SINGLE, *SEVERAL, Device("2 x 141 GB (H200)", 143771, 2)),
    ),
}

HEADER = """\
# Capacity

<!-- Written by `vllm-eigen bench capacity --output docs/capacity.md`; do not edit. -->

Users that fit at once, each with {context:,} tokens in the cache (OPT: its longest, 2,048), by
model, GPU, KV ratio and element type of the cache. `base` is the model as it is; `coded` are
latents of full rank in so many bits (3: half of the directions in 4, half in 2), with the values'
scales.

This is arithmetic over the models' sizes, the same as `vllm-eigen estimate`, and no measurement. It
counts {utilization:.0%} of the memory that the driver reports, less {workspace} GiB a GPU for
activations and CUDA graphs, less the 16-bit weights (of the compressed model: those with its
bases), in whole blocks of 16 tokens. What a ratio costs in quality differs from model to model:
`vllm-eigen evaluate` tells. GPUs that hold no user beside the weights are left out.

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.md", help="table to write"
    )


def run(args: argparse.Namespace) -> int:
    """Write the document.

    Raises:
        OutputError: the file system refuses.
    """
    from vllm_eigen.benchmarks.lib.results import write_text

    write_text(args.output, render())
    return 0


def users(
    config: Mapping[str, Any],
    device: Device,
    kv_ratio: float | None = None,
    cache_type: str = "auto",
    kv_bits: int | None = None,
) -> int:
    """Whole sequences of CONTEXT tokens, or the model's longest; 0 if the weights do not fit."""
    from vllm_eigen.checkpoint.estimate import estimate

    longest = min(CONTEXT, int(config.get("max_position_embeddings", CONTEXT)))
    try:
        found = estimate(
            config,
            device.budget,
            kv_ratio=kv_ratio,
            kv_bits=kv_bits,
            kv_cache_dtype=cache_type,
            max_model_len=longest,
        )
    except UsageError:  # the weights do not fit
        return 0
    return int(found.compressed.sequences)


def render() -> str:
    """The whole document."""
    columns = [(ratio, kind) for kind in CACHE_TYPES for ratio in RATIOS]
    titles = [
        f"{ratio or 'base'}, {'16 bits' if kind != 'fp8' else kind}" for ratio, kind in columns
    ]
    titles += [f"coded, {bits} bits" for bits in CODED_BITS]
    rows = []
    for name, (config, devices) in MODELS.items():
        for device in devices:
            counts = [users(config, device, ratio, kind) for ratio, kind in columns]
            counts += [users(config, device, kv_bits=bits) for bits in CODED_BITS]
            if any(counts):
                rows.append((name, device.name, *(f"{count:,}" for count in counts)))
    header = HEADER.format(
        context=CONTEXT, utilization=UTILIZATION, workspace=WORKSPACE // (1 << 30)
    )
    return header + "\n".join(table(("model", "GPU", *titles), rows, right_from=2)) + "\n"
