# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen report`: an HTML page with plots of checkpoints of one base model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.calibration.commands.calibrate import DEVICE_HELP, add_text_arguments, corpus_of
from vllm_eigen.common.errors import UsageError
from vllm_eigen.common.packages import check_torchvision

if TYPE_CHECKING:
    from vllm_eigen.calibration.reporting.report import Measured

HELP = "write an HTML page with spectra, ranks and quality of checkpoints"
_SWEEPS = ("ratios", "samples")
_HELD_OUT = 16
"""Windows of the text to measure a sweep on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="DIR", help="Eigen checkpoints of one model"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder to make (default: DIR-report)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--sweep",
        metavar="WHAT",
        help="calibrate the base model again as the first DIR was, and measure over `ratios`, "
        "`samples` or `ratios,samples`",
    )
    add_text_arguments(parser)
    parser.add_argument("--base", metavar="MODEL", help="base model (default: as recorded)")
    parser.add_argument(
        "--samples", type=int, default=128, metavar="N", help="most windows (default %(default)s)"
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="L", help="tokens a window (default: as the first DIR's)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help=DEVICE_HELP
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and print where it is."""
    from vllm_eigen.common.files import check_free

    sweeps = (args.sweep or "").split(",") if args.sweep else []
    unknown = [name for name in sweeps if name not in _SWEEPS]
    if unknown:
        raise UsageError(f"--sweep {unknown[0]} is unknown; choose from {', '.join(_SWEEPS)}")
    if (args.text or args.dataset) and not sweeps:
        raise UsageError("--text is for --sweep; say what to measure, e.g. --sweep ratios,samples")
    for name, value, least in (("--samples", args.samples, 1), ("--seq-len", args.seq_len, 2)):
        if value is not None and value < least:
            raise UsageError(f"{name} {value} is out of range; it is at least {least}")
    first: Path = args.checkpoints[0]
    output = args.output or first.resolve().with_name(f"{first.resolve().name}-report")
    check_free(output, overwrite=args.overwrite)
    from vllm_eigen.calibration.reporting.report import read_checkpoints, write_report

    read_checkpoints(args.checkpoints)
    measured = _measure(args, sweeps) if sweeps else None
    page = write_report(args.checkpoints, output, measured=measured, overwrite=args.overwrite)
    print(page)
    return 0


def _measure(args: argparse.Namespace, sweeps: list[str]) -> Measured:
    """Run the sweeps on the base model of the first checkpoint."""
    check_torchvision()
    from vllm_eigen.calibration.evaluation.evaluate import find_base
    from vllm_eigen.calibration.job import Recipe
    from vllm_eigen.calibration.model.device import pick_device
    from vllm_eigen.calibration.model.text import sample_windows
    from vllm_eigen.calibration.reporting.report import Measured
    from vllm_eigen.calibration.reporting.sweep import Sweep
    from vllm_eigen.checkpoint.validate import validate
    from vllm_eigen.common import provenance
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    eigen = validate(args.checkpoints[0])
    source = find_base(args.checkpoints[0], eigen, args.base)
    corpus = corpus_of(args)()
    made: dict[str, Any] = eigen.provenance.get("calibration") or {}
    length = min(args.seq_len or made.get("seq_len") or 2048, source.max_positions)
    windows = sample_windows(
        corpus,
        source.tokenizer(),
        samples=args.samples,
        length=length,
        seed=0,
        vocab_size=source.vocab_size,
        held_out=_HELD_OUT,
    )
    with terminate_as_interrupt(), Reporter() as reporter:
        device = pick_device(args.device)
        recipe = Recipe.resolve(
            source,
            eigen.method,
            key_mode=eigen.key_mode,
            head_group=eigen.head_group,
            refit=bool(made.get("refit")),
        )
        sweep = Sweep(source, recipe, windows, device, reporter)
        ratios = sweep.over_ratios() if "ratios" in sweeps else []
        samples = sweep.over_samples(eigen.kv_ratio) if "samples" in sweeps else []
    about = (
        f"Calibrated and measured on {corpus.name}: {len(windows.chosen)} windows of {length} "
        f"tokens at most, and {len(windows.held_out)} others to measure on, method {eigen.method}, "
        "offline in transformers' layers, float32."
    )
    record = provenance.collect(["vllm-eigen", *sys.argv[1:]])
    return Measured(ratios, samples, about, record)
