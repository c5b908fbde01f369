"""`vllm-eigen estimate MODEL --memory 80GiB`: what fits, with and without compression."""

from __future__ import annotations

import argparse
import dataclasses
import json

from vllm_eigen.errors import UsageError

HELP = "say what a model's KV cache takes and holds, with and without compression"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id, base or compressed")
    parser.add_argument(
        "--memory",
        required=True,
        metavar="SIZE",
        help="memory for weights and KV cache, e.g. 80GiB: on a GPU its size times "
        "--gpu-memory-utilization, less activations",
    )
    parser.add_argument(
        "--kv-ratio", type=float, metavar="R", help="KV size to compress to, e.g. 0.6"
    )
    parser.add_argument(
        "--kv-cache-dtype", default="auto", metavar="TYPE", help="element type, e.g. fp8"
    )
    parser.add_argument(
        "--max-model-len", type=int, metavar="N", help="tokens of a sequence (the model's longest)"
    )
    parser.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens a block (16; CPU: 128)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the estimate; returns the exit status.

    Raises:
        UsageError, InputError, CheckpointError: an argument or the model is of no use.
    """
    from server.estimate import estimate
    from server.units import parse_size
    from server.weights import read_model

    for name in ("max_model_len", "block_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is out of range; give 1 or more")
    memory = parse_size(args.memory)
    config, stored = read_model(args.model)
    found = estimate(
        config,
        memory,
        kv_ratio=args.kv_ratio,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=args.max_model_len,
        block_size=args.block_size,
        stored_bytes=stored,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0

    from rich.console import Console
    from rich.table import Table

    from server.units import counted, size

    table = Table(title=f"{args.model} ({found.architecture}) in {size(memory)}")
    table.add_column("")
    for heading in ("uncompressed", f"KV ratio {found.kv_ratio:.2f}"):
        table.add_column(heading, justify="right")
    plain, small = found.uncompressed, found.compressed
    table.add_row("weights", size(plain.weight_bytes), size(small.weight_bytes))
    table.add_row("KV pool", size(plain.pool_bytes), size(small.pool_bytes))
    table.add_row("KV bytes a token", f"{plain.bytes_per_token:,}", f"{small.bytes_per_token:,}")
    table.add_row("tokens the pool holds", counted(plain.tokens), counted(small.tokens))
    table.add_row(
        f"sequences of {found.max_model_len:,} tokens",
        f"{plain.sequences:,.1f}",
        f"{small.sequences:,.1f}",
    )
    Console().print(table)
    return 0
