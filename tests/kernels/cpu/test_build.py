# SPDX-License-Identifier: Apache-2.0
"""When the kernels are compiled, where they are looked for, and on whose threads they run.

On a source of three lines in place of the kernels' own, which takes the compiler a minute.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_eigen.common.cache import CACHE_VARIABLE
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.cpu import build, compiler

TINY = """
#include <dlfcn.h>
#include <omp.h>
extern "C" __attribute__((visibility("default"))) const char *openmp() {
  Dl_info found;
  return dladdr((void *)omp_get_num_threads, &found) ? found.dli_fname : "";
}
"""
REPORT = """
import ctypes, sys
from pathlib import Path
import {first}, {second}
from vllm_eigen.kernels.cpu import build, compiler
compiler.SOURCES = Path(sys.argv[1])
build.share_openmp()
library = ctypes.CDLL(str(build.compiled("portable")))
library.openmp.restype = ctypes.c_char_p
print(build._openmp_runtime(), library.openmp().decode())
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed (apt install g++)")
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "kernels.cpp").write_text(TINY)
    monkeypatch.setattr(compiler, "SOURCES", folder)
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "lib")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return folder


@pytest.mark.parametrize("order", [("torch", "sentencepiece"), ("sentencepiece", "torch")])
def test_torchs_own_threads_compute_whatever_else_is_loaded(
    source: Path, order: tuple[str, str]
) -> None:
    """Sentencepiece brings a second OpenMP library, whose threads vLLM does not bind."""
    pytest.importorskip("sentencepiece")
    code = REPORT.format(first=order[0], second=order[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    runtime, used = done.stdout.split()
    if runtime == "None":
        pytest.skip("torch has no OpenMP library of GNU here")
    assert "/torch" in runtime
    assert Path(used).resolve() == Path(runtime).resolve()


def test_a_compiler_is_needed_only_to_build(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build.compiled("portable")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.compiled("portable") == built
    built.unlink()
    with pytest.raises(KernelError, match="install g"):
        build.compiled("portable")


def test_the_wheels_library_comes_first_and_only_for_its_sources(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.find("portable") is None
    build.SHIPPED.mkdir()
    shipped = compiler.build_library("portable", build.SHIPPED)
    monkeypatch.setenv("PATH", "")
    assert build.compiled("portable") == build.find("portable") == shipped
    with (source / "kernels.cpp").open("a") as sink:
        sink.write("// changed")
    assert build.find("portable") is None


def test_a_library_that_lacks_its_threads_is_refused_when_loaded(source: Path) -> None:
    (source / "kernels.cpp").write_text(
        'extern "C" void missing_function(); extern "C" void f() { missing_function(); }'
    )
    with pytest.raises(OSError, match="missing_function"):
        ctypes.CDLL(str(build.compiled("portable")))
