# SPDX-License-Identifier: Apache-2.0
"""Find the C++ kernels for this machine: in the wheel, else compiled once into the user's cache.

Used by `bindings.py` on first use. The library's name carries a hash of sources and flags, so an
update compiles anew and processes of different versions live side by side. Where it is built
already no compiler is needed.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vllm_eigen.common.cache import CACHE_VARIABLE, user_cache
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.cpu.compiler import ISA_LEVELS, SHIPPED, build_library, name_of_library

ISA_VARIABLE = "EIGEN_CPU_ISA"
LOCK_SECONDS = 300.0


def supported_isas() -> list[str]:
    """The instruction-set levels this processor runs, best first; always ends in "portable"."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    if "amx_tile" in flags and not _may_use_tiles():
        flags.remove("amx_tile")
    return [name for name, needed in ISA_LEVELS.items() if flags.issuperset(needed)]


def _may_use_tiles() -> bool:
    """Ask Linux for the tiles of AMX, for all threads of this process; older kernels refuse."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    status = ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)
    return bool(status == 0)


def chosen_isa() -> str:
    """The level named by EIGEN_CPU_ISA, else the best one.

    Raises:
        KernelError: the named level is unknown, or this processor lacks it.
    """
    supported = supported_isas()
    named = os.environ.get(ISA_VARIABLE)
    if named and named not in supported:
        raise KernelError(
            f"{ISA_VARIABLE}={named} does not run here; choose one of {', '.join(supported)}"
        )
    return named or supported[0]


def find(isa: str, extra_flags: tuple[str, ...] = ()) -> Path | None:
    """The built kernels for `isa`, from the wheel or the user's cache; None if there are none."""
    name = name_of_library(isa, extra_flags)
    return next((p for p in (SHIPPED / name, user_cache() / name) if p.exists()), None)


def compiled(isa: str, extra_flags: tuple[str, ...] = ()) -> Path:
    """Path of the compiled kernels for `isa`, building them if this user has none yet.

    `extra_flags` go to the compiler and the linker (sanitizers). Processes that build at once
    wait for each other at most LOCK_SECONDS, then build for themselves.

    Raises:
        KernelError: there is no g++, it fails, or the cache folder cannot be written.
    """
    if (path := find(isa, extra_flags)) is not None:
        return path
    folder = user_cache()
    path = folder / name_of_library(isa, extra_flags)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            return path if path.exists() else build_library(isa, folder, extra_flags)
    except OSError as error:
        raise KernelError(
            f"cannot build the CPU kernels in {folder}: {error}; "
            f"set {CACHE_VARIABLE} to a writable folder"
        ) from error


def share_openmp() -> None:
    """Let libraries loaded from now on find torch's OpenMP runtime.

    The kernels then run on its one pool of threads, bound as vLLM bound them.

    Raises:
        KernelError: torch has none, and neither has the system.
    """
    try:
        ctypes.CDLL(_openmp_runtime() or "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise KernelError(
            f"the CPU kernels need libgomp (apt install libgomp1): {error}"
        ) from error


def _openmp_runtime() -> str | None:
    """The OpenMP library that torch has loaded into this process, or any other one, if any."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    paths = re.findall(r"(/\S*/lib[gi]?omp[^/\s]*\.so\S*)$", maps, re.MULTILINE)
    gomp = [path for path in paths if "/libgomp" in path]
    # Other packages (sentencepiece) bring copies of their own, with threads nobody has bound.
    return next((path for path in gomp if "/torch" in path), next(iter(gomp), None))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock, or go on without it after LOCK_SECONDS."""
    with ExitStack() as stack:
        with suppress(Timeout):
            stack.enter_context(FileLock(path, timeout=LOCK_SECONDS))
        yield
