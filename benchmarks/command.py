"""`vllm-eigen bench`: benchmarks as subcommands."""

from __future__ import annotations

import argparse

from benchmarks import attention, serve

HELP = "measure attention kernels, and serving under load"

_COMMANDS = {"attention": attention, "serve": serve}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand a benchmark."""
    commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, module in _COMMANDS.items():
        subparser = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run_benchmark=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was named."""
    return int(args.run_benchmark(args))
