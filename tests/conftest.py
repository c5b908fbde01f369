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

SHARE_SERVERS = {
    f"tests/server/test_{name}.py"
    for name in (
        "api_errors",
        "dashboard",
        "memory_api",
        "openai_client",
        "openapi",
        "protected",
        "shutdown",
    )
}
"""Those that use the servers of `tests/server/conftest.py`; a start takes up to a minute."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", type=Path, metavar="FILE", help="write what was found here")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--compatibility")
    if path is not None and not hasattr(config, "workerinput"):  # of pytest-xdist
        from tests.engine.compatibility import Compatibility

        config.pluginmanager.register(Compatibility(path))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A test file goes to one process; so do all files that share started servers."""
    from xdist.scheduler import LoadFileScheduling

    class LoadServerScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = str(super()._split_scope(nodeid))
            return "servers" if path in SHARE_SERVERS else path

    return LoadServerScheduling(config, log)
