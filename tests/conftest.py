# SPDX-License-Identifier: Apache-2.0
"""Settings for the whole suite: no network, no usage statistics, one thread a test process.

Tests run in several processes at once, and threads that wait for each other crawl on shared cores.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

TIERS = {
    "tests/kernels/": "kernel",
    "tests/plugin/": "engine",
    "tests/server/stats/": "unit",
    "tests/server/http/test_limits.py": "unit",
    "tests/server/launch/test_estimate.py": "unit",
    "tests/server/": "server",
    "tests/docker/": "deploy",
    "tests/docs/": "deploy",
    "tests/packaging/": "deploy",
    "tests/": "unit",
}
"""Tier of the tests below a path; the first that fits counts, a test's own marker before it."""
ORDER = ("server", "kernel", "engine", "deploy", "unit")
"""Tiers by how long their longest file takes: what is long begins first."""
TOGETHER = ("tests/server/",)
"""Files below these go to one process: they share started servers."""


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's model, one copy in the user's cache for all tests and the demo."""
    from demo import model
    from vllm_eigen.common.errors import EigenError

    try:
        return model.fetch()
    except EigenError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error} (in CI this is a failure)")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", type=Path, metavar="FILE", help="write what was found here")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--compatibility")
    if path is not None and not hasattr(config, "workerinput"):  # of pytest-xdist
        from tests.plugin.harness.compatibility import Compatibility

        config.pluginmanager.register(Compatibility(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test its tier; files with slow tests of early tiers come first."""
    first: dict[Path, tuple[bool, int]] = {}
    for item in items:
        tiers = {mark.name for mark in item.iter_markers() if mark.name in ORDER}
        if not tiers:
            path = item.path.relative_to(config.rootpath).as_posix()
            tiers = {next(tier for place, tier in TIERS.items() if path.startswith(place))}
            item.add_marker(*tiers)
        if len(tiers) > 1:
            raise pytest.UsageError(f"{item.nodeid} has several tiers: {', '.join(sorted(tiers))}")
        rank = item.get_closest_marker("slow") is None, ORDER.index(*tiers)
        first[item.path] = min(rank, first.get(item.path, rank))
    items.sort(key=lambda item: first[item.path])


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A test file goes to one process, and some folders do; they begin in the order of `items`."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = str(super()._split_scope(nodeid))
            return next((folder for folder in TOGETHER if path.startswith(folder)), path)

    config.option.loadscopereorder = False  # by the number of tests
    return Scheduling(config, log)
