# SPDX-License-Identifier: Apache-2.0
"""The command: fast help, one-line errors, no traceback."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest

from vllm_eigen import cli
from vllm_eigen.common.errors import CheckpointError, EigenError, UsageError


class _Command:
    HELP = "test"

    def __init__(self, failure: BaseException | None) -> None:
        self.failure = failure

    def add_arguments(self, parser: object) -> None:
        pass

    def run(self, args: object) -> int:
        if self.failure is not None:
            raise self.failure
        return 7


def _main(monkeypatch: pytest.MonkeyPatch, failure: BaseException | None) -> int:
    monkeypatch.setattr(cli, "_load", lambda module: _Command(failure))
    return cli.main(["calibrate"])


def test_status_of_the_command_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _main(monkeypatch, None) == 7


@pytest.mark.parametrize(
    ("failure", "status"),
    [(UsageError("bad"), 2), (CheckpointError("bad"), 1), (KeyboardInterrupt(), 130)],
)
def test_failures_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    status: int,
) -> None:
    assert _main(monkeypatch, failure) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    if isinstance(failure, EigenError):
        assert captured.err == "vllm-eigen calibrate: bad\n"


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        _main(monkeypatch, ZeroDivisionError())


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)


@pytest.mark.parametrize("name", sorted(entry.name for entry in entry_points(group=cli.GROUP)))
def test_every_option_is_explained_in_80_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    (entry,) = entry_points(group=cli.GROUP, name=name)
    module = cli._load(entry.value)
    top = argparse.ArgumentParser(prog=f"vllm-eigen {name}", description=module.HELP)
    module.add_arguments(top)
    for parser in _parsers(top):
        if parser is not top:
            assert max(map(len, parser.format_help().splitlines())) <= 80, parser.prog
        for action in parser._actions:
            assert action.help, (parser.prog, action.dest)
            if "--json" in action.option_strings:  # to standard output; files have --output-json
                assert action.nargs == 0, parser.prog


def test_help_lists_commands_without_heavy_imports() -> None:
    code = (
        "import sys; from vllm_eigen import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'transformers', 'datasets', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {"calibrate", "evaluate", "serve"} <= set(done.stdout.split())
    assert time.monotonic() - began < 10
