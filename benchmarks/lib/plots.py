# SPDX-License-Identifier: Apache-2.0
"""Matplotlib without a display, and plots written as other results are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_eigen.common.files import atomic_file


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG and release it.

    Raises:
        OutputError: the file system refuses.
    """
    with atomic_file(path) as work:
        figure.savefig(work, format="png", dpi=110)
    pyplot().close(figure)
