"""Atomic output: a reader sees the old state or the new one, never half of either.

Work happens in a temporary neighbour of the target, which is renamed over it only when complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_eigen.errors import OutputError


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
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _refused(target, error) from error
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        _replace_directory(work, target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write; it replaces `target` when the block ends without an exception.

    Raises:
        OutputError: the file system refuses to write.
    """
    target = Path(os.path.abspath(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise _refused(target, error) from error
    work = Path(name)
    try:
        work.chmod(0o666 & ~_umask())
        yield work
        work.replace(target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        work.unlink(missing_ok=True)


def check_free(target: Path, *, overwrite: bool) -> None:
    """Refuse an existing non-empty output early, before any long work.

    Raises:
        OutputError: `target` exists and `overwrite` is false, or is not a directory.
    """
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
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.rename(aside / target.name)
        try:
            work.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refused(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {target}: {reason}; free space or choose another place")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
