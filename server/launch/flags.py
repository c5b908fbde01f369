# SPDX-License-Identifier: Apache-2.0
"""Refuses misspelt flags of `serve` before vLLM is imported, which alone takes many seconds.

`vllm-flags.txt` lists the flags of one vLLM release. Under another release a flag that is not in it
may be new, and is left to vLLM's parser. To write it anew:

    python -m vllm_eigen.server.launch.flags > server/launch/vllm-flags.txt
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from importlib.resources import files

from vllm_eigen.common.errors import UsageError

FILE = "vllm-flags.txt"
OURS = ("--eigen-bases", "--open-routes", "--max-body-size")


def listed() -> tuple[str, list[str]]:
    """The vLLM release of the list, and its flags, each with two dashes."""
    text = (files("vllm_eigen.server.launch") / FILE).read_text(encoding="utf-8")
    release, *flags = text.split()
    return release, flags


def check_flags(arguments: Sequence[str], release: str) -> None:
    """Refuse a flag that the installed vLLM does not know.

    Args:
        arguments: the command line after `serve`.
        release: of the installed vLLM.

    Raises:
        UsageError: names the flag, and the one it resembles most.
    """
    listed_release, flags = listed()
    if release.split("+")[0] != listed_release:
        return
    known = [*flags, *OURS]
    for flag in _flags(arguments):
        # A unique beginning is enough for argparse; whether it is unique, vLLM's parser says.
        if any(name.startswith(flag) for name in known):
            continue
        near = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "`serve --help=all` lists all flags"
        raise UsageError(f"unknown flag {flag}; {hint}")


def parser_flags(parser: argparse.ArgumentParser) -> list[str]:
    """The flags that a parser knows, sorted."""
    options = {option for action in parser._actions for option in action.option_strings}
    return sorted(option for option in options if option.startswith("--"))


def _flags(arguments: Sequence[str]) -> Iterator[str]:
    """The flags of a command line as vLLM spells them: `--a_b.c=1` is `--a-b`."""
    for argument in arguments:
        if argument.startswith("--") and argument != "--":
            name = argument[2:].partition("=")[0].partition(".")[0]
            yield "--" + name.replace("_", "-")


def main() -> None:
    """Print the list for the installed vLLM."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_eigen.plugin.vllm_version import check_vllm_version, own_module

    parser = own_module().make_arg_parser(FlexibleArgumentParser())
    print(check_vllm_version().split("+")[0], *parser_flags(parser), sep="\n")


if __name__ == "__main__":
    main()
