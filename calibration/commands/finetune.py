# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen finetune`: train a checkpoint on text, at the same ranks and in the same format."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from vllm_eigen.calibration.commands.calibrate import DEVICE_HELP, add_text_arguments, corpus_of
from vllm_eigen.common.packages import check_torchvision

HELP = "train a checkpoint on text to win back quality; its KV bytes stay the same"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="Eigen checkpoint")
    add_text_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="DIR2", help="folder to make")
    parser.add_argument(
        "--steps", type=int, default=200, metavar="N", help="at most (default %(default)s)"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=5e-4,
        metavar="X",
        help="of AdamW at its highest (default %(default)s)",
    )
    parser.add_argument(
        "--seq-len", type=int, default=512, metavar="L", help="tokens a window (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order (default %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help=DEVICE_HELP
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing DIR2, or DIR without --output"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, no summary")


def run(args: argparse.Namespace) -> int:
    """Train, save if it helped, and print one line about the result."""
    from vllm_eigen.checkpoint.validate import validate
    from vllm_eigen.common.errors import UsageError
    from vllm_eigen.common.files import check_free
    from vllm_eigen.common.provenance import collect

    for name, value, least in (("--steps", args.steps, 1), ("--seq-len", args.seq_len, 2)):
        if value < least:
            raise UsageError(f"{name} {value} is out of range; it is at least {least}")
    if not (args.learning_rate > 0 and math.isfinite(args.learning_rate)):
        raise UsageError(f"--learning-rate {args.learning_rate:g} is out of range; try 5e-4")
    if args.output is None and not args.overwrite:
        raise UsageError(
            "pass --output DIR2, the folder to make, or --overwrite to replace the checkpoint"
        )
    output: Path = args.output or args.checkpoint
    check_free(output, overwrite=args.overwrite)
    validate(args.checkpoint)
    check_torchvision()

    from vllm_eigen.calibration.finetuning.finetune import finetune
    from vllm_eigen.calibration.finetuning.train import Training
    from vllm_eigen.calibration.model.device import pick_device
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    with terminate_as_interrupt(), Reporter(quiet=args.quiet) as reporter:
        losses = finetune(
            args.checkpoint,
            corpus_of(args)(),
            output,
            Training(args.steps, args.learning_rate, args.seed),
            length=args.seq_len,
            device=pick_device(args.device),
            provenance=collect(["vllm-eigen", *sys.argv[1:]]),
            reporter=reporter,
            overwrite=args.overwrite,
        )
    if not args.quiet:
        before, after = math.exp(losses[0][1]), math.exp(losses[-1][1])
        print(
            f"{output}: held-out perplexity {before:.4f} -> {after:.4f} "
            f"after {losses[-1][0]} steps",
            file=sys.stderr,
        )
    return 0
