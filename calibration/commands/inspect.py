# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen inspect`: ranks, bits and fp8 scales of a checkpoint, layer by layer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_eigen.checkpoint.config import EigenConfig

HELP = "show a checkpoint's ranks, bits, fp8 scales, KV bytes and how it was made"
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="Eigen checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON only")


def run(args: argparse.Namespace) -> int:
    """Validate the checkpoint and print its table."""
    from vllm_eigen.checkpoint.config import read_config
    from vllm_eigen.checkpoint.validate import validate

    eigen = validate(args.checkpoint)
    config, _ = read_config(args.checkpoint)
    summary = summarise(config, eigen)
    if args.json:
        print(json.dumps(summary, indent=2))
        return 0
    base = eigen.provenance.get("base", {}).get("name", "unknown")
    print(f"base            {base} ({config['architectures'][0]})")
    print(f"method          {eigen.method}, key cache {eigen.key_mode}")
    print(f"heads           {eigen.num_heads} query, {eigen.num_kv_heads} KV of {eigen.head_size}")
    print(f"cached heads    {eigen.num_latent_heads} of {eigen.head_size * eigen.head_group}")
    if eigen.kept_layers:
        print(
            f"compressed      {len(eigen.layers)} of {eigen.num_layers} layers; numbers are theirs"
        )
    print(f"KV ratio        {eigen.kv_ratio:.4f}")
    print(f"bytes a token   {summary['bytes_per_token']:,}", end="")
    print(f" of {summary['uncompressed_bytes_per_token']:,} ({summary['dtype']})")
    print(f"tokens per GiB  {summary['tokens_per_gib']:,}")
    print()
    last = ("bits K", "bits V") if eigen.coded else ("fp8 scale K", "fp8 scale V")
    print("  ".join(("layer", "rank K", "rank V", "ratio", *last)))
    for layer, row in zip(eigen.layers, summary["layers"], strict=True):
        number = row["layer"]
        print(f"{number:5}  {layer.rank_k:6}  {layer.rank_v:6}  {row['kv_ratio']:.3f}", end="")
        if eigen.coded:
            print(f"  {row['bits_k']:6.2f}  {row['bits_v']:6.2f}", end="")
            print(f"  (K {layer.key_code}, V {layer.value_code})")
        else:
            print(f"  {layer.k_scale:11.4g}  {layer.v_scale:11.4g}")
    return 0


def summarise(config: dict[str, Any], eigen: EigenConfig) -> dict[str, Any]:
    """What the command prints, JSON-ready; bytes at the checkpoint's own element type."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    size = _BYTES.get(dtype, 2)
    full = eigen.head_size * eigen.head_group
    per_token = eigen.bytes_per_token(size)
    return {
        "architecture": config["architectures"][0],
        "method": eigen.method,
        "key_mode": eigen.key_mode,
        "projections": eigen.projections,
        "head_group": eigen.head_group,
        "num_latent_heads": eigen.num_latent_heads,
        "full_rank": full,
        "kv_ratio": eigen.kv_ratio,
        "kept_layers": list(eigen.kept_layers),
        "kept_bytes_per_token": eigen.kept_bytes_per_token(size),
        "dtype": dtype,
        "bytes_per_token": per_token,
        "uncompressed_bytes_per_token": eigen.uncompressed_bytes_per_token(size),
        "tokens_per_gib": (1 << 30) // per_token,
        "layers": [
            {
                "layer": index,
                "rank_k": layer.rank_k,
                "rank_v": layer.rank_v,
                "kv_ratio": layer.num_bytes(2) / (2 * 2 * full),
                "k_scale": layer.k_scale,
                "v_scale": layer.v_scale,
                "key_code": None if layer.key_code is None else layer.key_code.model_dump(),
                "value_code": None if layer.value_code is None else layer.value_code.model_dump(),
                "bits_k": 8 * layer.key_bytes(size) / layer.rank_k,
                "bits_v": 8 * layer.value_bytes(size) / layer.rank_v,
                "bytes_per_token": eigen.num_latent_heads * layer.num_bytes(size),
            }
            for index, layer in zip(eigen.layer_indices, eigen.layers, strict=True)
        ],
        "provenance": eigen.provenance,
    }
