# SPDX-License-Identifier: Apache-2.0
"""Compile the C++ kernels for this machine, once, into the user's cache.

Used by `bindings.py` on first use. The library's name carries a hash of sources, flags and OpenMP
runtime, so an update compiles anew and processes of different versions live side by side. Where it
is built already no compiler is needed. No torch headers: the compiler needs seconds and nothing but
g++.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vllm_eigen.common.cache import CACHE_VARIABLE, user_cache
from vllm_eigen.common.errors import KernelError

SOURCES = Path(__file__).parent / "csrc"
ISA_VARIABLE = "EIGEN_CPU_ISA"
BUILD_SECONDS = 600.0
LOCK_SECONDS = 300.0

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_AVX512_BF16 = (*_AVX2, *_AVX512, "avx512_bf16", "avx512_vnni")
# Best first: name -> processor flags needed, as /proc/cpuinfo spells them.
ISA_LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512_BF16, "amx_tile", "amx_int8", "amx_bf16"),
    "avx512bf16": _AVX512_BF16,
    "avx512": (*_AVX2, *_AVX512),
    "avx2": _AVX2,
    "portable": (),
}
COMPILE_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-math-errno", "-ffp-contract=off"),
    *("-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"),
)


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


def compiled(isa: str, extra_flags: tuple[str, ...] = ()) -> Path:
    """Path of the compiled kernels for `isa`, building them if this user has none yet.

    `extra_flags` go to the compiler and the linker (sanitizers). Processes that build at once
    wait for each other at most LOCK_SECONDS, then build for themselves; the finished file appears
    in one step.

    Raises:
        KernelError: there is no g++, it fails, or the cache folder cannot be written.
    """
    runtime = _openmp_runtime()
    flags = (*COMPILE_FLAGS, *_isa_flags(isa), *extra_flags)
    path = user_cache() / f"kernels-{isa}-{_fingerprint(flags, runtime)}.so"
    if path.exists():
        return path
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        raise KernelError("the CPU kernels need a C++ compiler: install g++ (apt install g++)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            if not path.exists():
                _build(path, compiler, flags, extra_flags, runtime)
    except OSError as error:
        raise KernelError(
            f"cannot build the CPU kernels in {path.parent}: {error}; "
            f"set {CACHE_VARIABLE} to a writable folder"
        ) from error
    return path


def _build(
    path: Path,
    compiler: str,
    flags: tuple[str, ...],
    link_flags: tuple[str, ...],
    runtime: str | None,
) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder, "kernels.o"), Path(folder, path.name)
        _run(compiler, *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", str(compiled))
        # The OpenMP runtime torch has loaded: one pool of threads, bound as vLLM bound them.
        openmp = runtime or "-fopenmp"
        _run(compiler, "-shared", *link_flags, str(compiled), openmp, "-o", str(linked))
        os.replace(linked, path)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the C++ compiler {command[0]} did not finish: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise KernelError(f"{command[0]} cannot compile the CPU kernels: {lines[0].strip()}")


def _isa_flags(isa: str) -> tuple[str, ...]:
    """As gcc spells them: -mavx512bf16, but -mamx-tile."""
    return tuple(
        "-m" + flag.replace("_", "-" if flag.startswith("amx") else "") for flag in ISA_LEVELS[isa]
    )


def _fingerprint(flags: tuple[str, ...], runtime: str | None) -> str:
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.rglob("*.h"), *SOURCES.glob("*.cpp")]):
        name = str(source.relative_to(SOURCES))
        digest.update(name.encode() + b"\0" + source.read_bytes())
    digest.update(repr((flags, runtime)).encode())
    return digest.hexdigest()[:16]


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
