"""Atomic output: nothing half-written, whatever happens inside."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from vllm_eigen.errors import OutputError
from vllm_eigen.files import atomic_directory, atomic_file


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
