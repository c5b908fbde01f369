# SPDX-License-Identifier: Apache-2.0
"""Models that the engine tests share, made once a session."""

from __future__ import annotations

import gc
import importlib.util
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.plugin.harness import engine as harness
from tests.plugin.harness.rows import Row, Served

FAMILIES = ("llama", "opt")
LOCK_SECONDS = 300
Models = Callable[[str, str, float], Path]
Rows = Callable[[Row], Served]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "feature(name): one of vLLM's features, shown to work")
    config.addinivalue_line("markers", "refused(name): a combination that ends in a message")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers():
            if mark.name in ("feature", "refused"):
                item.user_properties.append((mark.name, mark.args[0]))
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if "tests/plugin" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # `start_quickly` froze; libraries warn of what they find alive at the end.


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from demo import texts

    return texts.write("calibration", tmp_path_factory.mktemp("text") / "calibration.txt", 100_000)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Models:
    """`models(family, dtype, ratio)`: the base model at ratio 0, else an Eigen checkpoint."""

    @cache
    def make(family: str, dtype: str, ratio: float) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{dtype}-{ratio}")
        if ratio == 0:
            return harness.write_base(family, folder, getattr(torch, dtype))
        return harness.calibrate(make(family, dtype, 0), folder, text, ratio, "--overwrite")

    return make


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """A matrix row's models, made by the test process that first asks for them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "rows").mkdir(exist_ok=True)

    @cache
    def make(row: Row) -> Served:
        made = folder / "rows" / str(row)
        record = made.with_suffix(".pickle")
        with FileLock(made.with_suffix(".lock"), timeout=LOCK_SECONDS):
            if not record.exists():
                made.mkdir()
                record.write_bytes(pickle.dumps(row.write(made)))
        found: Served = pickle.loads(record.read_bytes())
        return found

    return make
