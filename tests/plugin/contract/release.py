# SPDX-License-Identifier: Apache-2.0
"""Run another vLLM release's Python files with the installed release's compiled ones, on the CPU.

For releases without a CPU build. Every engine test may be run so:

    export VLLM_TARGET_DEVICE=cpu PYTHONPATH=$(python -m tests.plugin.contract.release 0.33.0)
    pytest tests/plugin/test_matrix.py
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from tests.plugin.contract.wheel import python_files
from vllm_eigen.calibration.cache import cache_folder
from vllm_eigen.common.errors import EngineError


def overlay(version: str, folder: Path) -> Path:
    """Fill a folder for `PYTHONPATH` with links to both releases' files; returns it.

    Raises:
        EngineError: no vLLM is installed.
        InputError: the release cannot be fetched.
    """
    files = python_files(version)
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise EngineError("no vLLM is installed whose compiled files could be used; make install")
    compiled = Path(spec.origin).parent.glob("_C*.so")
    (folder / "vllm").mkdir(parents=True, exist_ok=True)
    for target in [*files.glob("vllm/*"), *compiled]:
        _link(folder / "vllm" / target.name, target)
    for target in files.glob("*.dist-info"):
        _link(folder / target.name, target)
    return folder


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


if __name__ == "__main__":
    print(overlay(sys.argv[1], cache_folder() / "vllm-python" / f"{sys.argv[1]}-cpu"))
