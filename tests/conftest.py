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

TOGETHER = ("tests/server/", "tests/kernels/")
"""Files below these go to one process: they share started servers, or compiled kernels."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", type=Path, metavar="FILE", help="write what was found here")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--compatibility")
    if path is not None and not hasattr(config, "workerinput"):  # of pytest-xdist
        from tests.engine.compatibility import Compatibility

        config.pluginmanager.register(Compatibility(path))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A test file goes to one process, and some folders do; what has most tests begins first."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = str(super()._split_scope(nodeid))
            return next((folder for folder in TOGETHER if path.startswith(folder)), path)

    return Scheduling(config, log)
