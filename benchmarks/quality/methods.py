# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench quality`: what each calibration method costs in quality.

Every method is calibrated on one text and compared with its base on another, both streamed
through plain transformers in float32, by the code that `vllm-eigen calibrate` runs. Rows of other
models and methods in the CSV file are kept, so that models of different texts share a table; its
neighbours .md, .png and .json (provenance of every row's run) are written anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_eigen.benchmarks.lib.arguments import positive
from vllm_eigen.common.errors import EigenError

HELP = "perplexity of the calibration methods by KV ratio"

RATIOS = (0.53, 0.34, 0.27, 0.21, 0.16)
METHODS = ("bf16", "fp8", "int8", "int4", "coded", "sensitivity", "paper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="DIR", help="(none: only write the tables anew)"
    )
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="calibration text")
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE", help="held-out text")
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=float,
        default=list(RATIOS),
        metavar="R",
        help="KV ratios to compress to",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="M",
        help="NAME[:HEAD_GROUP][:post-rope][:no-refit][:refit][:global], or a cache: bf16, fp8, "
        "int8, int4",
    )
    parser.add_argument("--samples", type=int, default=128, help="windows (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens a window (%(default)s)")
    parser.add_argument(
        "--test-seq-len", type=int, metavar="N", help="tokens a test window (as --seq-len)"
    )
    parser.add_argument("--test-tokens", type=int, default=40_000, help="(%(default)s)")
    parser.add_argument(
        "--questions",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="multiple-choice questions: jsonl of ctx, choices, gold",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="first N questions of each file (all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="to compute on (a GPU if there is one)",
    )
    parser.add_argument(
        "--csv", type=Path, required=True, metavar="FILE.csv", help="table to add to"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and write; 1 if a model could not be measured, whose reason is printed."""
    from vllm_eigen.benchmarks.lib.results import collect_provenance, write_json, write_text
    from vllm_eigen.benchmarks.quality.method_plot import plot
    from vllm_eigen.benchmarks.quality.method_rows import markdown, read_rows, write_rows
    from vllm_eigen.benchmarks.quality.method_runs import MethodRuns, Variant
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    rows = {row.key: row for row in read_rows(args.csv)}
    log = args.csv.with_suffix(".json")
    runs: list[dict[str, Any]] = json.loads(log.read_text()) if log.exists() else []
    failed = False
    with terminate_as_interrupt(), Reporter() as reporter:
        for model in args.models:
            try:
                bench = MethodRuns(model, args, reporter)
                for label in args.methods:
                    found = bench.rows(Variant.parse(label), args.ratios)
                    rows.update({row.key: row for row in found})
                    write_rows(args.csv, list(rows.values()))
            except EigenError as error:
                reporter.note(f"{Path(model).name}: {error}")
                failed = True
    if args.models:
        models = [Path(model).name for model in args.models]
        write_json(log, [*runs, {"models": models, **collect_provenance()}])
    table = list(rows.values())
    write_text(args.csv.with_suffix(".md"), markdown(table))
    plot(args.csv.with_suffix(".png"), table)
    return int(failed)
