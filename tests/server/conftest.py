# SPDX-License-Identifier: Apache-2.0
"""Two servers for all tests of `server/`, one at a time: a plain one, and one behind a key.

A start imports vLLM in four processes, so tests are ordered by the server they ask for
(`SERVER_FIXTURES`): each server is started once, and those that kill it come last.

Servers run in `decoy_folder`: our modules must not be hidden by a user's `server.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server import served_model
from vllm_eigen.plugin.vllm_version import vllm_version
from vllm_eigen.server.launch.process import ServerProcess, start

KEY = "sk-test-key"
ROOT_PATH = "/prefix"
NAME = "tiny"
MAX_MODEL_LEN = served_model.MAX_POSITIONS
POOL_BYTES = 16 << 20
START_SECONDS = 240.0
DRAIN_SECONDS = 120
"""Enough for a long answer where the machine has other work."""
COMMON = (
    "--served-model-name", NAME, "--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager",
    "--kv-cache-memory-bytes", str(POOL_BYTES), "--enable-auto-tool-choice",
    "--tool-call-parser", "hermes",
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
)  # fmt: skip
ENVIRONMENT = {
    # These tests are not about kernels: neither attention nor sampling needs to be compiled.
    "EIGEN_KERNELS": "reference",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
OPTIONS = {
    "plain": (),
    "guarded": (
        "--api-key", KEY, "--root-path", ROOT_PATH, "--api-server-count", "2",
        "--open-routes", "/metrics", "/dashboard", "--shutdown-timeout", str(DRAIN_SECONDS),
    ),
}  # fmt: skip


SERVER_FIXTURES = ("plain", "supervised_site", "guarded")
"""In the order of their tests; `supervised_site` takes over the plain server and kills it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests of this folder by the server they ask for; others stay in their places."""
    folder = Path(__file__).parent
    places = [place for place, item in enumerate(items) if folder in item.path.parents]
    ordered = sorted((items[place] for place in places), key=_server_order)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _server_order(item: pytest.Item) -> int:
    """Index of the item's server in `SERVER_FIXTURES`, -1 without one."""
    used = [name for name in SERVER_FIXTURES if name in getattr(item, "fixturenames", ())]
    return SERVER_FIXTURES.index(used[0]) if used else -1


class Fleet:
    """Starts the servers by name and keeps at most one of them running."""

    def __init__(self, model: Path, logs: Path, folder: Path) -> None:
        self._model = model
        self._logs = logs
        self.folder = folder
        self._name = ""
        self._stack = contextlib.ExitStack()
        self._server: ServerProcess | None = None

    def get(self, name: str) -> ServerProcess:
        """The server of that name, ready."""
        if self._server is None or name != self._name or self._server.process.poll() is not None:
            self.stop()
            log = self._logs / f"{name}.log"
            started = start(
                self._model,
                *COMMON,
                *OPTIONS[name],
                log=log,
                environment=ENVIRONMENT,
                folder=self.folder,
            )
            server = self._stack.enter_context(started)
            server.wait_ready(START_SECONDS)
            self._server, self._name = server, name
        return self._server

    def stop(self) -> None:
        """Stop what runs."""
        self._server = None
        self._stack.close()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return served_model.write(tmp_path_factory.mktemp("model") / NAME)


@pytest.fixture(scope="session")
def decoy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules with the names of our top-level folders that fail on import."""
    folder = tmp_path_factory.mktemp("folder")
    for name in ("server", "calibration", "benchmarks"):
        (folder / f"{name}.py").write_text("raise ImportError('hides a module of vllm_eigen')")
    return folder


@pytest.fixture(scope="session")
def fleet(
    checkpoint: Path, decoy_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    if vllm_version() is None:
        pytest.skip("vLLM is not installed")
    fleet = Fleet(checkpoint, tmp_path_factory.mktemp("logs"), decoy_folder)
    yield fleet
    fleet.stop()


@pytest.fixture
def plain(fleet: Fleet) -> ServerProcess:
    """No key, no prefix, one API process."""
    return fleet.get("plain")


@pytest.fixture
def guarded(fleet: Fleet) -> ServerProcess:
    """API key, root path, two API processes."""
    return fleet.get("guarded")


@pytest.fixture
def http(plain: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=plain.url, timeout=60) as client:
        yield client
