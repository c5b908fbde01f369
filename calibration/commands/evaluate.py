"""`vllm-eigen evaluate`: quality of a checkpoint against its base on a text."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibration.commands.calibrate import add_text_arguments, corpus_of

HELP = "perplexity, top-1 agreement and KL of a checkpoint against its base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="Eigen checkpoint")
    add_text_arguments(parser)
    parser.add_argument("--base", metavar="MODEL", help="base model (default: as recorded)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read at most N tokens")
    parser.add_argument(
        "--tasks", nargs="+", type=Path, metavar="FILE", help="jsonl of ctx, choices, gold"
    )
    parser.add_argument("--task-limit", type=int, metavar="N", help="questions of each task")
    parser.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "fp8"),
        default="auto",
        help="fp8: round cached latents as vLLM's fp8 cache does; the base keeps its own",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON only")


def run(args: argparse.Namespace) -> int:
    """Evaluate offline in transformers and print the result."""
    from calibration.evaluate import evaluate
    from calibration.interrupt import terminate_as_interrupt
    from calibration.progress import Reporter
    from calibration.stream import pick_device
    from vllm_eigen.checkpoint import validate

    validate(args.checkpoint)
    corpus = corpus_of(args, default_split="test")()
    with terminate_as_interrupt(), Reporter(quiet=args.json) as reporter:
        found = evaluate(
            args.checkpoint,
            corpus,
            base=args.base,
            device=pick_device(args.device),
            reporter=reporter,
            max_tokens=args.max_tokens,
            tasks=args.tasks or (),
            task_limit=args.task_limit,
            kv_cache_dtype=args.kv_cache_dtype,
        )
    quality, eigen = found.quality, found.eigen
    if args.json:
        result: dict[str, Any] = {
            "base": {"perplexity": quality.base_perplexity},
            "eigen": {"perplexity": quality.eigen_perplexity},
            "kv_ratio": eigen.kv_ratio,
            "top1_agreement": quality.top1_agreement,
            "kl_per_token": quality.kl_per_token,
            "tokens": quality.tokens,
        }
        if args.kv_cache_dtype != "auto":
            result["kv_cache_dtype"] = args.kv_cache_dtype
        if found.tasks:
            result["tasks"] = {
                name: {"base": asdict(base), "eigen": asdict(compressed)}
                for name, (base, compressed) in found.tasks.items()
            }
        print(json.dumps(result, indent=2))
        return 0
    change = quality.eigen_perplexity / quality.base_perplexity - 1
    print(f"perplexity      {quality.base_perplexity:.4f} -> {quality.eigen_perplexity:.4f}")
    print(f"increase        {change:+.2%}")
    print(f"top-1 agreement {quality.top1_agreement:.4f}")
    print(f"KL a token      {quality.kl_per_token:.5f} nats")
    print(f"KV ratio        {eigen.kv_ratio:.4f}")
    cache = ", fp8 cache" if args.kv_cache_dtype == "fp8" else ""
    print(f"tokens          {quality.tokens}, offline in transformers, float32{cache}")
    for name, (base, compressed) in found.tasks.items():
        print(
            f"{name:<15} acc {base.acc:.3f} -> {compressed.acc:.3f}, "
            f"acc_norm {base.acc_norm:.3f} -> {compressed.acc_norm:.3f}"
        )
    return 0
