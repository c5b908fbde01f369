# SPDX-License-Identifier: Apache-2.0
"""Argument groups and types that several benchmarks have."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_eigen.common.errors import UsageError


def add_output(parser: argparse.ArgumentParser) -> None:
    """`--output FILE.json` for a measurement, or `--from FILE.json` for its tables alone."""
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="result; tables beside it")
    add_from(parser)


def add_from(parser: argparse.ArgumentParser) -> None:
    """`--from FILE.json`, as `args.earlier`: write the tables of an earlier result."""
    parser.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="FILE.json",
        help="measure nothing: write the tables of this result beside it",
    )


def require(args: argparse.Namespace, *names: str) -> None:
    """Refuse a command line that lacks options which only a measurement needs.

    Raises:
        UsageError: one is missing.
    """
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is None]
    if missing:
        raise UsageError(f"a measurement needs {', '.join(missing)}")


def positive(text: str) -> int:
    """A whole number above zero."""
    value = count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be above zero")
    return value


def count(text: str) -> int:
    """A whole number of zero or more."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of zero or more")
    return value
