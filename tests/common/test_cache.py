# SPDX-License-Identifier: Apache-2.0
"""Where caches are, and how our environment variables are called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_eigen.common.cache import user_cache

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("vllm_eigen", "calibration", "server", "benchmarks", "demo", "docker", "examples")


def test_the_cache_is_the_users_or_the_one_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EIGEN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "vllm-eigen"
    monkeypatch.setenv("EIGEN_CACHE", str(tmp_path / "own"))
    assert user_cache() == tmp_path / "own"


def test_no_variable_has_the_prefix_of_vllms() -> None:
    """VLLM warns at each start of a variable it does not know that begins with VLLM_."""
    found = {
        name
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".example") or path.name.startswith("Dockerfile")
        for name in re.findall(r"(?<![\w-])-?VLLM_EIGEN\w*|EIGEN_CACHE", path.read_text("utf-8"))
    }
    assert found == {"EIGEN_CACHE"}
