# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen evaluate`: quality of a checkpoint against its base on a text and on tasks."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.calibration.commands.calibrate import add_text_arguments, corpus_of
from vllm_eigen.common.packages import check_torchvision

if TYPE_CHECKING:
    from vllm_eigen.calibration.evaluation.inputs import Evaluation

HELP = "perplexity, top-1 agreement, KL and accuracy of a checkpoint against its base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="Eigen checkpoint")
    add_text_arguments(parser)
    parser.add_argument("--base", metavar="MODEL", help="base model (default: as recorded)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read at most N tokens")
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="offline in float32 (default), or as vLLM serves both, one after the other",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="names of lm-evaluation-harness (piqa,arc_easy), or jsonl of ctx, choices, gold",
    )
    parser.add_argument(
        *("--include-path", "--task-path"),
        dest="task_path",
        type=Path,
        metavar="DIR",
        help="more task descriptions for lm_eval, as YAML",
    )
    parser.add_argument(
        *("--limit", "--task-limit"),
        dest="task_limit",
        type=int,
        metavar="N",
        help="questions of each task",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "fp8"),
        default="auto",
        help="the checkpoint's cache, rounded as vLLM's if offline; the base keeps its own",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="for transformers"
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the result."""
    check_torchvision()
    from vllm_eigen.calibration.evaluation.evaluate import evaluate
    from vllm_eigen.calibration.evaluation.taskset import TaskSet
    from vllm_eigen.calibration.model.device import pick_device
    from vllm_eigen.checkpoint.validate import validate
    from vllm_eigen.common.errors import UsageError
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens} is out of range; it is at least 1")
    if args.engine == "vllm":
        if args.device != "auto":
            raise UsageError("--device is for transformers; vLLM runs where it was built for")
        from vllm_eigen.plugin.vllm_version import check_vllm_version

        check_vllm_version()
    validate(args.checkpoint)
    tasks = TaskSet(args.tasks or (), args.task_path, args.task_limit)
    corpus = corpus_of(args, default_split="test")()
    with terminate_as_interrupt(), Reporter(quiet=args.json) as reporter:
        found = evaluate(
            args.checkpoint,
            corpus,
            base=args.base,
            device=pick_device(args.device),
            reporter=reporter,
            max_tokens=args.max_tokens,
            tasks=tasks,
            fp8_cache=args.kv_cache_dtype == "fp8",
            served=args.engine == "vllm",
        )
    if args.json:
        print(json.dumps(_result(found, args), indent=2))
    else:
        _print(found, args)
    return 0


def _result(found: Evaluation, args: argparse.Namespace) -> dict[str, Any]:
    """JSON-ready; what was not measured is null, and `notes` says why."""
    quality = found.quality
    kl = quality.kl_per_token
    result: dict[str, Any] = {
        "engine": args.engine,
        "base": {"perplexity": quality.base_perplexity},
        "eigen": {"perplexity": quality.eigen_perplexity},
        "kv_ratio": found.eigen.kv_ratio,
        "kv_cache_dtype": args.kv_cache_dtype,
        "top1_agreement": quality.top1_agreement,
        "kl_per_token": None if math.isnan(kl) else kl,
        "tokens": quality.tokens,
        "window": found.window,
        "notes": list(found.notes),
    }
    if found.tasks:
        result["tasks"] = {
            name: {"base": asdict(base), "eigen": asdict(eigen)}
            for name, (base, eigen) in found.tasks.items()
        }
    return result


def _print(found: Evaluation, args: argparse.Namespace) -> None:
    quality = found.quality
    change = quality.eigen_perplexity / quality.base_perplexity - 1
    kl = quality.kl_per_token
    print(f"engine          {_conditions(args)}")
    print(f"perplexity      {quality.base_perplexity:.4f} -> {quality.eigen_perplexity:.4f}")
    print(f"increase        {change:+.2%}")
    print(f"top-1 agreement {quality.top1_agreement:.4f}")
    print(f"KL a token      {'not measured' if math.isnan(kl) else f'{kl:.5f} nats'}")
    print(f"KV ratio        {found.eigen.kv_ratio:.4f}")
    print(f"tokens          {quality.tokens}, in windows of {found.window}")
    for name, (base, eigen) in found.tasks.items():
        line = f"{name:<15} acc {base.acc:.3f} -> {eigen.acc:.3f}"
        if base.acc_norm is not None and eigen.acc_norm is not None:
            line += f", acc_norm {base.acc_norm:.3f} -> {eigen.acc_norm:.3f}"
        print(line)
    for note in found.notes:
        print(f"note: {note}")


def _conditions(args: argparse.Namespace) -> str:
    fp8 = args.kv_cache_dtype == "fp8"
    if args.engine == "transformers":
        return "transformers, offline, float32" + (", fp8 cache simulated" if fp8 else "")
    from vllm_eigen.plugin.vllm_version import vllm_version

    return f"vLLM {vllm_version()}, as served" + (", fp8 cache of the checkpoint" if fp8 else "")
