# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen estimate MODEL --memory 80GiB`: capacity with and without compression."""

from __future__ import annotations

import argparse
import dataclasses
import json

from vllm_eigen.common.errors import UsageError

_BLOCK_SIZES = {"cuda": 16, "cpu": 128}
"""vLLM's own, by device."""
HELP = "estimate the size and capacity of a model's KV cache, with and without compression"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id, base or compressed")
    parser.add_argument("--revision", metavar="R", help="of a hub model: branch, tag or commit")
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
        "--kv-bits",
        type=float,
        metavar="B",
        help="the same as bits of a cached number, of coded latents, as `calibrate --kv-bits`",
    )
    parser.add_argument(
        "--kv-cache-dtype", default="auto", metavar="TYPE", help="element type, e.g. fp8"
    )
    parser.add_argument(
        "--max-model-len", type=int, metavar="N", help="tokens of a sequence (the model's maximum)"
    )
    parser.add_argument(
        "--device",
        choices=tuple(_BLOCK_SIZES),
        default="cuda",
        help="where vLLM will run, which the next two depend on (default %(default)s)",
    )
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="tokens per block (16; on CPUs 128)"
    )
    parser.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="two steps at once (as vLLM has them on GPUs, and not on CPUs)",
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of a step, which sliding windows hold besides (2048)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the estimate; returns the exit status.

    Raises:
        UsageError, InputError, CheckpointError: an argument or the model cannot be used.
    """
    from vllm_eigen.checkpoint.estimate import estimate
    from vllm_eigen.common.sizes import parse_size
    from vllm_eigen.server.launch.model_files import read_config, weight_bytes

    for name in ("max_model_len", "block_size", "max_num_batched_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is out of range; give 1 or more")
    memory = parse_size(args.memory)
    on_gpu = args.device == "cuda"
    two_steps = on_gpu if args.async_scheduling is None else args.async_scheduling
    result = estimate(
        read_config(args.model, args.revision),
        memory,
        kv_ratio=args.kv_ratio,
        kv_bits=args.kv_bits,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=args.max_model_len,
        block_size=args.block_size or _BLOCK_SIZES[args.device],
        in_flight=args.max_num_batched_tokens * (1 + two_steps),
        stored_bytes=weight_bytes(args.model, args.revision),
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
        return 0

    from rich.console import Console
    from rich.table import Table

    from vllm_eigen.common.sizes import format_bytes, format_count

    table = Table(title=f"{args.model} ({result.architecture}) in {format_bytes(memory)}")
    table.add_column("")
    for heading in ("uncompressed", f"KV ratio {result.kv_ratio:.2f}"):
        table.add_column(heading, justify="right")
    both = (result.uncompressed, result.compressed)
    table.add_row("weights", *(format_bytes(one.weight_bytes) for one in both))
    table.add_row("KV pool", *(format_bytes(one.pool_bytes) for one in both))
    table.add_row("KV bytes per token", *(f"{one.bytes_per_token:,}" for one in both))
    table.add_row("tokens the pool holds", *(format_count(one.tokens) for one in both))
    table.add_row(
        f"sequences of {result.max_model_len:,} tokens", *(f"{one.sequences:,.1f}" for one in both)
    )
    if result.kept_layers:
        table.caption = (
            f"{result.kept_layers} layers with sliding windows are not compressed; of the whole "
            f"pool a full-length sequence takes {result.pool_ratio:.2f} of the base model's bytes"
        )
    Console().print(table)
    return 0
