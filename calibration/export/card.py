# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint: what it is, how to serve it, and the numbers measured."""

from __future__ import annotations

from vllm_eigen.calibration.model.source import Source
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.checkpoint.config import EigenConfig


def model_card(source: Source, eigen: EigenConfig) -> str:
    """README.md of the checkpoint, with the front matter that the Hugging Face hub reads."""
    record = eigen.provenance
    calibration = record.get("calibration", {})
    lines = [
        "---",
        *([f"base_model: {source.name}"] if "/" in source.name else []),
        "library_name: vllm",
        "tags: [eigen-attention, kv-cache-compression, low-rank]",
        "---",
        "",
        f"# {source.name}, KV cache at {eigen.kv_ratio:.2f}",
        "",
        f"{source.name} with a {'coded, ' if eigen.coded else ''}low-rank KV cache (Eigen "
        f"Attention, arXiv 2408.05646): {eigen.bytes_per_token(2):,} cached bytes a token instead "
        f"of {eigen.uncompressed_bytes_per_token(2):,} at 16 bits, ratio {eigen.kv_ratio:.4f}. "
        f"{_kept(eigen)}Serve it with the vLLM plugin `vllm-eigen`:",
        "",
        "    vllm-eigen serve DIR",
        "",
        *_measured(record.get("measured", {})),
        "## Ranks",
        "",
        f"Full rank {eigen.head_size * eigen.head_group}, {eigen.num_latent_heads} cached heads a "
        f"layer, key cache `{eigen.key_mode}`, method `{eigen.method}`.",
        "",
        "| layer | rank K | rank V | bits K | bits V | layer output error |",
        "|---|---|---|---|---|---|",
        *(
            f"| {index} | {layer.rank_k} | {layer.rank_v} | {_bits(layer.key_code)} "
            f"| {_bits(layer.value_code)} | {error} |"
            for index, layer, error in zip(
                eigen.layer_indices,
                eigen.layers,
                _errors(calibration, len(eigen.layers)),
                strict=True,
            )
        ),
        "",
        "## Calibration",
        "",
        *(
            f"- {name.replace('_', ' ')}: {value}"
            for name, value in calibration.items()
            if not isinstance(value, list)
        ),
        f"- command: `{record.get('command', '')}`",
        "",
    ]
    return "\n".join(lines)


def _measured(measured: dict[str, float]) -> list[str]:
    if not measured:
        return []
    return [
        "## Measured on held-out windows of the calibration text",
        "",
        "Offline in transformers' layers, float32.",
        "",
        "| | base | eigen |",
        "|---|---|---|",
        f"| perplexity | {measured['base_perplexity']:.4f} | {measured['eigen_perplexity']:.4f} |",
        f"| top-1 agreement | 1 | {measured['top1_agreement']:.4f} |",
        f"| KL a token | 0 | {measured['kl_per_token']:.5f} |",
        "",
        f"{int(measured['tokens']):,} tokens.",
        "",
    ]


def _bits(code: Code | None) -> str:
    return "16" if code is None else f"{code.bits:.2f} ({code})"


def _kept(eigen: EigenConfig) -> str:
    """Which layers the numbers are about, where not all are compressed."""
    if not eigen.kept_layers:
        return ""
    return (
        f"Only the {len(eigen.layers)} layers with full attention are compressed, and these are "
        f"their bytes; the {len(eigen.kept_layers)} with sliding windows are the base model's. "
    )


def _errors(calibration: dict[str, object], count: int) -> list[str]:
    errors = calibration.get("layer_errors")
    if not isinstance(errors, list):
        return ["-"] * count
    return [f"{error:.4f}" for error in errors]
