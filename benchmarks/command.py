# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench`: each benchmark is a subcommand.

A benchmark is a light module with `HELP`, `add_arguments(parser)` and `run(args)`, as every
subcommand of `vllm-eigen`: torch, vLLM and the like are imported inside `run`.
"""

from __future__ import annotations

import argparse
import importlib

HELP = "measure kernels, the engine, servers under load, and quality"

BENCHMARKS = {
    "attention": "vllm_eigen.benchmarks.kernels.attention",
    "gpu": "vllm_eigen.benchmarks.kernels.gpu.command",
    "gpu-model": "vllm_eigen.benchmarks.kernels.gpu.model",
    "engine-decode": "vllm_eigen.benchmarks.engine.decode",
    "overheads": "vllm_eigen.benchmarks.engine.overheads",
    "serve": "vllm_eigen.benchmarks.serving.serve",
    "soak": "vllm_eigen.benchmarks.soak.soak",
    "faults": "vllm_eigen.benchmarks.soak.faults",
    "capacity": "vllm_eigen.benchmarks.serving.capacity",
    "quality": "vllm_eigen.benchmarks.quality.methods",
    "calibration": "vllm_eigen.benchmarks.calibration.command",
    "predictions": "vllm_eigen.benchmarks.calibration.predictions",
    "served-tasks": "vllm_eigen.benchmarks.quality.served_tasks",
    "needle": "vllm_eigen.benchmarks.quality.needle",
}
"""Name to module; adding a benchmark is a module and a row."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand a benchmark."""
    commands = parser.add_subparsers(
        dest="benchmark", metavar="BENCHMARK", required=True, help="what to measure"
    )
    for name, path in BENCHMARKS.items():
        module = importlib.import_module(path)
        subparser = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run_benchmark=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was named."""
    return int(args.run_benchmark(args))
