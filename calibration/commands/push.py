# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen push`: publish a checkpoint on the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "push a checkpoint to the Hugging Face hub, with licence, base model and metrics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="Eigen checkpoint")
    parser.add_argument("repository", metavar="REPO", help="OWNER/NAME, made if it is not there")
    add_hub_arguments(parser)


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """How to publish; shared with `calibrate --push`."""
    parser.add_argument(
        "--license", metavar="ID", help="as the hub calls it (default: the base model's)"
    )
    parser.add_argument("--private", action="store_true", help="make a private repository")


def run(args: argparse.Namespace) -> int:
    """Push, and print the repository's address."""
    from vllm_eigen.calibration.export.push import base_of, destination, push

    base, commit = base_of(args.checkpoint)
    to = destination(
        args.repository,
        base=base,
        commit=commit,
        licence=args.license,
        private=args.private,
        folder=args.checkpoint,
    )
    print(push(args.checkpoint, to))
    return 0
