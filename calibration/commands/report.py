"""`vllm-eigen report`: an HTML page with figures about checkpoints of one base model."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write an HTML page with spectra, ranks and quality of checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="DIR", help="Eigen checkpoints of one model"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder to make (default: DIR-report)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    """Write the page and print where it is."""
    from vllm_eigen.errors import UsageError
    from vllm_eigen.files import check_free

    first: Path = args.checkpoints[0]
    output = args.output or first.resolve().with_name(f"{first.resolve().name}-report")
    check_free(output, overwrite=args.overwrite)
    try:
        from calibration.report import write_report
    except ImportError as error:
        raise UsageError(f"reports need {error.name}; install vllm-eigen[calibrate]") from error
    print(write_report(args.checkpoints, output, overwrite=args.overwrite))
    return 0
