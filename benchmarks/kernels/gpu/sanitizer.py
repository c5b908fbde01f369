# SPDX-License-Identifier: Apache-2.0
"""The kernels below NVIDIA's compute-sanitizer, which sees accesses outside of allocations."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from itertools import product
from typing import Any

TOOL = "compute-sanitizer"
COMMAND = [sys.executable, "-m", "vllm_eigen.benchmarks.kernels.gpu.sanitizer"]


def run(seconds: float) -> dict[str, Any]:
    """Errors that the tool counts, None where it says nothing; or why it did not run."""
    tool = shutil.which(TOOL)
    if tool is None:
        return {"skipped": f"{TOOL} is not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "3", *COMMAND]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"skipped": f"{TOOL} did not end in {seconds:.0f} seconds"}
    return read(done.stdout + done.stderr) | {"exit_status": done.returncode}


def read(text: str) -> dict[str, Any]:
    """The number of errors in the tool's report, and its last lines where there are some."""
    found = re.search(r"ERROR SUMMARY: (\d+) error", text)
    errors = int(found[1]) if found else None
    return {"errors": errors} | ({} if errors == 0 else {"report": text.splitlines()[-40:]})


def main(device: str = "cuda", longest: int = 700, most: int | None = None) -> None:
    """What runs below the tool: each kernel once, on small inputs.

    Args:
        longest: context of decode; prompts have a tenth of it.
        most: kernels to run; None for all.
    """
    from vllm_eigen.benchmarks.kernels.gpu.grid import CACHES, MODES
    from vllm_eigen.benchmarks.kernels.gpu.measure import prepare
    from vllm_eigen.benchmarks.kernels.gpu.points import GpuPoint
    from vllm_eigen.kernels.gpu.tiles import Tuning

    steps = ("decode", longest), ("prefill", longest // 10)
    for mode, (bits, ratio), (phase, context) in list(product(MODES, CACHES, steps))[:most]:
        point = GpuPoint(4, 2, 64, mode, phase, context, 2, bits, ratio)
        _, attend = prepare(point, Tuning(), device)
        attend()


if __name__ == "__main__":
    main()
