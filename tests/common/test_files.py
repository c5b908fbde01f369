# SPDX-License-Identifier: Apache-2.0
"""Atomic output: nothing half-written, whatever happens inside."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from vllm_eigen.common.errors import OutputError
from vllm_eigen.common.files import atomic_directory, atomic_file, check_free


def _entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_directory_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as work:
        (work / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert _entries(target.parent) == {"out"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), atomic_directory(tmp_path / "out") as work:
        (work / "a").write_text("1")
        raise failure
    assert _entries(tmp_path) == set()


def test_failure_keeps_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with pytest.raises(RuntimeError), atomic_directory(target, overwrite=True) as work:
        (work / "new").write_text("1")
        raise RuntimeError
    assert _entries(target) == {"old"}
    assert _entries(tmp_path) == {"out"}


def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with atomic_directory(target, overwrite=True) as work:
        (work / "new").write_text("1")
    assert _entries(target) == {"new"}
    assert _entries(tmp_path) == {"out"}


def test_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("1")
    with pytest.raises(OutputError, match="--overwrite"), atomic_directory(tmp_path / "out"):
        raise AssertionError("the block must not run")


def test_disk_full_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left") as caught:
        with atomic_directory(tmp_path / "out") as work:
            (work / "a").write_text("1")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert "\n" not in str(caught.value)
    assert _entries(tmp_path) == set()


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as work:
        work.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    with atomic_file(target) as work:
        work.write_text("new")
    assert target.read_text() == "new"
    assert _entries(tmp_path) == {"x.json"}


def _halted(inside: Callable[[], AbstractContextManager[Path]], ready: Path) -> int:
    """A child process that stays in the middle of its work; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            with inside() as work:
                (work / "half" if work.is_dir() else work).write_text("1")
                ready.touch()
                time.sleep(60)
        finally:
            os._exit(1)
    while not ready.exists():
        time.sleep(0.01)
    return child


def _kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("make", [atomic_directory, atomic_file])
def test_leftovers_of_the_dead_are_removed_and_of_the_living_are_not(
    tmp_path: Path, make: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    folder, ready = tmp_path / "here", tmp_path / "ready"
    folder.mkdir()
    # Neither another target's, nor of the form of ours.
    for name in (".other.eigen-999999999-abcdefgh", ".out.eigen-999999999", ".out.1234"):
        (folder / name).mkdir()
    kept = _entries(folder)
    child = _halted(lambda: make(folder / "out"), ready)
    try:
        busy = _entries(folder)
        assert len(busy - kept) == 1
        with make(folder / "out") as work:
            if work.is_file():
                work.write_text("2")
        assert _entries(folder) == busy | {"out"}
    finally:
        _kill(child)
    assert _entries(folder) == busy | {"out"}
    with make(folder / "out"):
        pass
    assert _entries(folder) == kept | {"out"}


def test_a_leftover_whose_lock_is_held_elsewhere_stays(tmp_path: Path) -> None:
    """As of another machine on a shared file system, whose processes cannot be seen from here."""
    ready = tmp_path / "ready"
    child = _halted(lambda: atomic_directory(tmp_path / "out"), ready)
    try:
        work = next(path for path in tmp_path.iterdir() if path.name.startswith(".out"))
        elsewhere = work.with_name(work.name.replace(str(child), "999999999"))
        work.rename(elsewhere)
        check_free(tmp_path / "out", overwrite=False)
        assert elsewhere.exists()
    finally:
        _kill(child)
    check_free(tmp_path / "out", overwrite=False)
    assert not elsewhere.exists()


def test_an_output_moved_aside_by_the_killed_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.eigen-old-999999999-abcdefgh"
    (aside / "out").mkdir(parents=True)
    (aside / "out" / "precious").touch()
    with pytest.raises(OutputError, match="--overwrite"):
        check_free(tmp_path / "out", overwrite=False)
    assert _entries(tmp_path) == {"out"}
    assert _entries(tmp_path / "out") == {"precious"}
