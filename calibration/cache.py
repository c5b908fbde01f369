# SPDX-License-Identifier: Apache-2.0
"""The user's cache folder, and where base models were last seen on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vllm_eigen.common.cache import CACHE_VARIABLE, user_cache
from vllm_eigen.common.errors import OutputError
from vllm_eigen.common.files import atomic_file


def cache_folder() -> Path:
    """The cache folder: `$EIGEN_CACHE`, the user's cache, or the temporary folder.

    Raises:
        OutputError: none of them can be written.
    """
    places = [user_cache()]
    if not os.environ.get(CACHE_VARIABLE):
        places.append(_temporary())
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise OutputError(f"cannot write {places[0]}; set {CACHE_VARIABLE} to a writable folder")


def record_base_folder(fingerprint: str, folder: Path) -> None:
    """Record where a base model is on this machine, so that checkpoints need no path."""
    with atomic_file(cache_folder() / "bases" / fingerprint) as path:
        path.write_text(str(folder.resolve()), encoding="utf-8")


def find_base_folder(fingerprint: str) -> Path | None:
    """Where the base model with this fingerprint was last seen on this machine, if it is there."""
    try:
        text = (cache_folder() / "bases" / fingerprint).read_text(encoding="utf-8")
    except OSError:
        return None
    return Path(text) if Path(text).is_dir() else None


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"vllm-eigen-{os.getuid()}"
