# SPDX-License-Identifier: Apache-2.0
"""How g++ makes a library of the C++ kernels: instruction sets, flags, file names.

Used on first use by `build.py`, and by `setup.py` for the wheel, which loads this file alone: it
needs the standard library and nothing but g++, no torch headers.

The library names no OpenMP runtime. `build.share_openmp` gives it the one that torch has loaded, so
one file serves every installation of torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from vllm_eigen.common.errors import KernelError

SOURCES = Path(__file__).parent / "csrc"
SHIPPED = Path(__file__).parent / "lib"
"""Libraries that a wheel brings; empty in a checkout."""
BUILD_SECONDS = 600.0

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


def machine_levels() -> list[str]:
    """The levels that processors of this machine's architecture can have, best first."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [name for name, needed in ISA_LEVELS.items() if x86 or not needed]


def name_of_library(isa: str, extra_flags: tuple[str, ...] = ()) -> str:
    """File name of the kernels for `isa`: it carries a hash of sources and flags."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.rglob("*.h"), *SOURCES.glob("*.cpp")]):
        name = str(source.relative_to(SOURCES))
        digest.update(name.encode() + b"\0" + source.read_bytes())
    digest.update(repr((*COMPILE_FLAGS, *_isa_flags(isa), *extra_flags)).encode())
    return f"kernels-{isa}-{digest.hexdigest()[:16]}.so"


def build_library(isa: str, folder: Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile the kernels for `isa` into `folder`; the finished file appears in one step.

    `extra_flags` go to the compiler and the linker (sanitizers).

    Raises:
        KernelError: there is no g++, or it fails.
        OSError: the folder cannot be written.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        raise KernelError("the CPU kernels need a C++ compiler: install g++ (apt install g++)")
    path = folder / name_of_library(isa, extra_flags)
    flags = (*COMPILE_FLAGS, *_isa_flags(isa), *extra_flags)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch, "kernels.o"), Path(scratch, path.name)
        _run(compiler, *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", str(compiled))
        # Symbols of OpenMP that are missing are an error when it is loaded, not in the first call.
        _run(compiler, "-shared", "-Wl,-z,now", *extra_flags, str(compiled), "-o", str(linked))
        os.replace(linked, path)
    return path


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
