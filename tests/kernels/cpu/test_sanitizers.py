# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels under AddressSanitizer and UBSan, over random shapes.

The sanitizer must be loaded before Python, hence a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.sanitized import FLAGS
from vllm_eigen.kernels.cpu.build import compiled, supported_isas

ROOT = Path(__file__).parents[3]
# The best level, and those whose products of codes are not those of the best.
ISAS = [isa for isa in supported_isas() if isa in (supported_isas()[0], "avx2", "portable")]


def _sanitizer() -> str | None:
    """Path of g++'s libasan, if it is installed."""
    if not shutil.which("g++"):
        return None
    command = ["g++", "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.slow
def test_no_bad_access(isa: str) -> None:
    preload = _sanitizer()
    if preload is None:
        pytest.skip("g++ with libasan is not installed (apt install g++)")
    compiled(isa, FLAGS)  # In the process below the compiler would be slowed by the sanitizer too.
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sanitized", isa, "25"],
        cwd=ROOT,
        # Python and torch keep memory until exit; only accesses are of interest.
        env={**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "clean" in done.stdout
