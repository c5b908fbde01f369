# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled in a process of their own: with the installed Triton, or with another one.

EIGEN_TEST_TRITON is a folder that holds another Triton, as `make gpu-compile` installs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

Reports = dict[str, list[dict[str, Any]]]


def reports(module: str, *arguments: str) -> Reports:
    """What a test module prints as a script: by case, its kernels as `CompiledKernel` has them."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if other := env.get("EIGEN_TEST_TRITON"):
        env["PYTHONPATH"] = os.pathsep.join([str(Path(other).resolve()), env.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        env=env,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)  # type: ignore[no-any-return]
