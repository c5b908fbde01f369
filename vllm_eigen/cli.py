# SPDX-License-Identifier: Apache-2.0
"""The `vllm-eigen` command: finds its subcommands and runs one.

A subcommand is a light module announced under the entry-point group `vllm_eigen.commands` with

    HELP: str
    def add_arguments(parser: argparse.ArgumentParser) -> None
    def run(args: argparse.Namespace) -> int

It imports torch, vLLM and the like only inside `run`, so `--help` stays instant. A module with
`RAW_ARGUMENTS = True` parses its own command line, found in `args.arguments`. Errors of the
project's tree, and imports of optional packages that are not installed, end as one line on standard
error; Ctrl-C ends with 130.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol

from vllm_eigen import __version__
from vllm_eigen.common.errors import EigenError
from vllm_eigen.common.packages import missing_package

GROUP = "vllm_eigen.commands"


class Command(Protocol):
    """What a subcommand module offers."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's options."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work; returns the exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    modules = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    args = _parse(arguments, modules)
    try:
        return int(args.run(args))
    except (EigenError, ModuleNotFoundError) as error:
        known = error if isinstance(error, EigenError) else missing_package(error)
        if known is None:
            raise
        print(f"vllm-eigen {args.command}: {known}", file=sys.stderr)
        return known.exit_code
    except KeyboardInterrupt:
        print(f"vllm-eigen {args.command}: interrupted", file=sys.stderr)
        return 130


def _parse(arguments: list[str], modules: dict[str, str]) -> argparse.Namespace:
    """Parse the command line; a named command imports only its own module."""
    named = arguments[0] if arguments and arguments[0] in modules else None
    if named is not None:
        command = _load(modules[named])
        if getattr(command, "RAW_ARGUMENTS", False):
            return argparse.Namespace(command=named, arguments=arguments[1:], run=command.run)
    parser = argparse.ArgumentParser(
        prog="vllm-eigen",
        description="Compress a model's KV cache with Eigen Attention and serve it in vLLM.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-eigen {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in [named] if named is not None else sorted(modules):
        command = _load(modules[name])
        subparser = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.usage = _usage(subparser)
        subparser.set_defaults(run=command.run)
    return parser.parse_args(arguments)


def _usage(parser: argparse.ArgumentParser) -> str:
    """One line of what must be given; argparse lists every option, wider than a terminal."""
    needed = [action for action in parser._actions if action.required or not action.option_strings]
    formatter = argparse.HelpFormatter(prog=f"{parser.prog} [options]", width=1000)
    formatter.add_usage(None, needed, [], prefix="")
    return formatter.format_help().strip()


def _load(module: str) -> Command:
    loaded: Command = importlib.import_module(module)
    return loaded


if __name__ == "__main__":
    sys.exit(main())
