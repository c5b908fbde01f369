"""The command: fast help, one-line errors, no traceback."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from vllm_eigen import cli
from vllm_eigen.errors import CheckpointError, EigenError, UsageError


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
