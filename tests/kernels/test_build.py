"""Which OpenMP runtime the kernels are linked with."""

from __future__ import annotations

import subprocess
import sys

import pytest

REPORT = """
import {first}, {second}
from vllm_eigen.kernels.build import _openmp_runtime
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
