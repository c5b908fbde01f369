# SPDX-License-Identifier: Apache-2.0
"""The command-line reference as Markdown, rendered from the argparse parsers themselves.

`docs/hooks.py` puts it into the built site as `cli.md`; `python docs/cli_reference.py` prints it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import entry_points

GROUP = "vllm_eigen.commands"
WIDTH = 88
"""Columns of a usage line."""
INTRODUCTION = """\
# Command line

<!-- Rendered by docs/cli_reference.py from the parsers; edit their help texts instead. -->

`vllm-eigen COMMAND --help` prints the same. Errors are one line on standard error. The exit status
is 0 for success, 2 for a wrong argument, 130 after Ctrl-C and 1 for other errors.
"""


def render() -> str:
    """The whole page: one section a subcommand."""
    entries = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    return "\n".join([INTRODUCTION, *(_command(entry.name, entry.value) for entry in entries)])


def _command(name: str, module_name: str) -> str:
    module = importlib.import_module(module_name)
    prog = f"vllm-eigen {name}"
    if getattr(module, "RAW_ARGUMENTS", False):  # vLLM parses these; the module prints a summary.
        return f"## `{prog}`\n\n{_sentence(module.HELP)}\n\n```text\n{module.USAGE}```\n"
    parser = argparse.ArgumentParser(prog=prog, description=module.HELP)
    module.add_arguments(parser)
    return "\n".join(_sections(parser, level=2))


def _sections(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    """A parser's section, then those of its subcommands."""
    yield f"{'#' * level} `{parser.prog}`\n\n{_sentence(parser.description or '')}\n"
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    parser.formatter_class = partial(argparse.HelpFormatter, width=WIDTH)
    yield f"```text\n{parser.format_usage()}```\n"
    rows = [
        f"| {_names(action)} | {_meaning(parser, action)} |"
        for action in parser._actions
        if action not in nested and not isinstance(action, argparse._HelpAction)
    ]
    if rows:
        yield "\n".join(["| argument | meaning |", "|---|---|", *rows, ""])
    for action in nested:
        for child in action.choices.values():
            yield from _sections(child, level + 1)


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = ""
    if action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
        value = f" {action.metavar or action.dest.upper()}"
        if action.choices and not action.metavar:
            value = ""
        if action.nargs in ("+", "*"):
            value += " ..."
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    if action.choices:
        choices = ", ".join(f"`{choice}`" for choice in action.choices)
        text = f"{text}: {choices}" if text else f"one of {choices}"
    if action.required and action.option_strings:
        text = f"{text} (required)" if text else "required"
    shown = isinstance(action.default, str | int | float) and not isinstance(action.default, bool)
    if shown and str(action.default) not in text:
        text += f" (default `{action.default}`)"
    elif shown and action.choices and "default" not in text:
        text += f"; default `{action.default}`"
    return text.replace("|", "\\|").replace("<", "&lt;").strip()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""


if __name__ == "__main__":
    sys.stdout.write(render())
