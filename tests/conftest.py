"""Settings for the whole suite: no network, no usage statistics, one thread a test process.

Tests run in several processes at once, and threads that wait for each other crawl on shared cores.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", type=Path, metavar="FILE", help="write what was found here")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--compatibility")
    if path is not None and not hasattr(config, "workerinput"):  # of pytest-xdist
        from tests.engine.compatibility import Compatibility

        config.pluginmanager.register(Compatibility(path))
