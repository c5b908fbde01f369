# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench calibration`: samples for quality, time and memory for the model's size.

Writes the result as JSON, and its tables as Markdown and a plot beside it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

HELP = "what calibration needs: windows for quality, time and memory by model size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--models", nargs="+", default=[], metavar="DIR", help="trained models")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="calibration text")
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE", help="held-out text")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a window (%(default)s)")
    parser.add_argument("--test-tokens", type=int, default=20_000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    parser.add_argument("--no-cost", action="store_true", help="leave out time and memory")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="result")


def run(args: argparse.Namespace) -> int:
    """Measure and write.

    Raises:
        InputError: a model or text cannot be used.
        EngineError: a calibration failed.
    """
    from vllm_eigen.benchmarks.calibration.cost import measure_cost
    from vllm_eigen.benchmarks.calibration.samples import measure_samples
    from vllm_eigen.benchmarks.calibration.tables import markdown, plot
    from vllm_eigen.benchmarks.lib.results import collect_provenance, write_json, write_text
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    with terminate_as_interrupt(), Reporter() as reporter:
        samples = measure_samples(args, reporter) if args.models else []
        costs = [] if args.no_cost else measure_cost(reporter)
    record: dict[str, Any] = {
        **collect_provenance(),
        "samples": [asdict(row) for row in samples],
        "costs": [asdict(row) for row in costs],
    }
    write_json(args.output, record)
    write_text(args.output.with_suffix(".md"), markdown(samples, costs))
    plot(args.output.with_suffix(".png"), samples, costs)
    return 0
