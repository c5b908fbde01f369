# SPDX-License-Identifier: Apache-2.0
"""Atomic output: a reader sees the old state or the new one, never half of either.

Work happens in a temporary neighbour of the target, which is renamed over it only when complete.
The neighbour's name holds its process, which locks it: what a killed process left is removed by the
next one with the same target.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_eigen.common.errors import OutputError

_OWNED = r"\.eigen-(old-)?(\d+)-[a-z0-9_]{8}"
"""End of a temporary neighbour's name, after a dot and the target's name."""


@contextlib.contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends without an exception.

    Raises:
        OutputError: `target` exists and `overwrite` is false, or the file system refuses to write.
    """
    target = Path(os.path.abspath(target))
    check_free(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    except OSError as error:
        raise _refused(target, error) from error
    claim = _claim(work)
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        _replace_directory(work, target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(claim)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write; it replaces `target` when the block ends without an exception.

    Raises:
        OutputError: the file system refuses to write.
    """
    target = Path(os.path.abspath(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        handle, name = tempfile.mkstemp(prefix=_prefix(target), dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise _refused(target, error) from error
    work = Path(name)
    claim = _claim(work)
    try:
        work.chmod(0o666 & ~_umask())
        yield work
        work.replace(target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        work.unlink(missing_ok=True)
        os.close(claim)


def check_free(target: Path, *, overwrite: bool) -> None:
    """Refuse an existing non-empty output early, before any long work.

    What a killed process left beside the output is removed, and an output that it had moved aside
    comes back.

    Raises:
        OutputError: `target` exists and `overwrite` is false, or is not a directory.
    """
    target = Path(os.path.abspath(target))
    _remove_leftovers(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"output {target} is a file; choose a directory")
    if not overwrite and any(target.iterdir()):
        raise OutputError(f"output {target} exists; pass --overwrite to replace it")


def _replace_directory(work: Path, target: Path) -> None:
    """Rename `work` to `target`; an old `target` is moved aside first and removed last."""
    if not target.exists():
        work.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=_prefix(target, "old-"), dir=target.parent))
    claim = _claim(aside)
    try:
        target.rename(aside / target.name)
        try:
            work.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(claim)


def _prefix(target: Path, kind: str = "") -> str:
    return f".{target.name}.eigen-{kind}{os.getpid()}-"


def _claim(work: Path) -> int:
    """Lock a temporary neighbour for as long as this process lives; returns the handle."""
    handle = os.open(work, os.O_RDONLY)
    with contextlib.suppress(OSError):  # no locks on this file system: leftovers stay there
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside the target, and put back what they took from there.

    The process must be gone and its lock free: on a shared file system it may be another machine's.
    """
    pattern = re.compile(re.escape(f".{target.name}") + _OWNED)
    try:
        neighbours = list(target.parent.iterdir())
    except OSError:
        return
    for path in neighbours:
        found = pattern.fullmatch(path.name)
        if found is None or _alive(int(found[2])):
            continue
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if found[1] and not target.exists() and (path / target.name).exists():
                (path / target.name).rename(target)  # killed between its two renames
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except OSError:
            continue
        finally:
            os.close(handle)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _refused(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {target}: {reason}; free space or choose another place")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
