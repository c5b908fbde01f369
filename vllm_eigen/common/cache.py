# SPDX-License-Identifier: Apache-2.0
"""The folder for what can be made again: compiled kernels, converted models, where bases are."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "EIGEN_CACHE"


def user_cache() -> Path:
    """`$EIGEN_CACHE`, else the user's cache folder of this project; it need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else user_cache_path("vllm-eigen")
