# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine on the GPU, base against Eigen: `bench engine-decode` in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_eigen.benchmarks.lib.results import read_json

OPTIONS = ("--layers", "4", "--contexts", "512", "8192", "--pairs", "3", "--batch", "8")


def run(seconds: float) -> dict[str, Any]:
    """The benchmark's document, or why there is none."""
    for package in ("vllm", "transformers", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            return {"skipped": f"{package} is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "engine.json"
        command = [sys.executable, "-m", "vllm_eigen.cli", "bench", "engine-decode"]
        command += [*OPTIONS, "--output", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"skipped": f"bench engine-decode did not end in {seconds:.0f} seconds"}
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines()
            return {"failed": f"exit status {done.returncode}", "report": lines[-40:]}
        return read_json(output)
