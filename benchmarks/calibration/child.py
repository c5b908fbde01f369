# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen calibrate` as a process of its own, timed, with its peak of resident memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_eigen.common.errors import EngineError

_CHILD = """
import re, sys
from vllm_eigen.cli import main
status = main(sys.argv[1:])
found = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(f"peak {int(found[1]) * 1024}")
sys.exit(status)
"""


@dataclass(frozen=True)
class Cost:
    """Of one calibration.

    Attributes:
        seconds: of the whole command, imports included.
        peak_bytes: largest resident memory of the process.
    """

    seconds: float
    peak_bytes: int


def calibrate(model: Path, options: Sequence[str], *, cache: Path, timeout: float) -> Cost:
    """Calibrate a model without a word; the output folder is in `options`.

    Args:
        cache: folder for what the project keeps between runs.
        timeout: in seconds.

    Raises:
        EngineError: it failed, with the last line it said, or took too long.
    """
    command = [sys.executable, "-c", _CHILD, "calibrate", str(model), *options, "--quiet"]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "EIGEN_CACHE": str(cache)},
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"calibrating {model.name} takes longer than {timeout:.0f} s") from None
    seconds = time.monotonic() - began
    found = re.search(r"peak (\d+)", done.stdout)
    if done.returncode or found is None:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise EngineError(f"calibrating {model.name} failed: {reason}")
    return Cost(round(seconds, 2), int(found[1]))
