# SPDX-License-Identifier: Apache-2.0
"""When the kernels are compiled, and which OpenMP runtime they are linked with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_eigen.common.cache import CACHE_VARIABLE
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.cpu.build import compiled

REPORT = """
import {first}, {second}
from vllm_eigen.kernels.cpu.build import _openmp_runtime
print(_openmp_runtime())
"""


@pytest.mark.parametrize("order", [("torch", "sentencepiece"), ("sentencepiece", "torch")])
def test_torchs_own_threads_compute_whatever_else_is_loaded(order: tuple[str, str]) -> None:
    """Sentencepiece brings a second OpenMP library, whose threads vLLM does not bind."""
    pytest.importorskip("sentencepiece")
    code = REPORT.format(first=order[0], second=order[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    path = done.stdout.strip()
    if path == "None":
        pytest.skip("torch has no OpenMP library of GNU here")
    assert "/torch" in path


def test_a_compiler_is_needed_only_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed (apt install g++)")
    built = compiled("portable")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled("portable") == built
    built.unlink()
    with pytest.raises(KernelError, match="install g"):
        compiled("portable")
