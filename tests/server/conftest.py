"""Two servers for all tests of `server/`, one at a time: a plain one, and one behind a key.

A start takes up to a minute; a test that asks for the other server stops the running one, so the
files are named such that this happens once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import served_model

from server.process import ServerProcess, start
from vllm_eigen.vllm_version import vllm_version

KEY = "sk-test-key"
ROOT_PATH = "/prefix"
NAME = "tiny"
MAX_MODEL_LEN = 1024
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
OPTIONS = {
    "plain": (),
    "guarded": (
        "--api-key", KEY, "--root-path", ROOT_PATH, "--api-server-count", "2",
        "--shutdown-timeout", str(DRAIN_SECONDS),
    ),
}  # fmt: skip


class Fleet:
    """Starts the servers by name and keeps at most one of them running."""

    def __init__(self, model: Path, logs: Path) -> None:
        self._model = model
        self._logs = logs
        self._name = ""
        self._stack = contextlib.ExitStack()
        self._server: ServerProcess | None = None

    def get(self, name: str) -> ServerProcess:
        """The server of that name, ready."""
        if self._server is None or name != self._name or self._server.process.poll() is not None:
            self.stop()
            log = self._logs / f"{name}.log"
            # What is tested here is not the kernels: the reference ones need no compiler.
            environment = {"VLLM_EIGEN_KERNELS": "reference", "VLLM_LOGGING_LEVEL": "INFO"}
            server = start(self._model, *COMMON, *OPTIONS[name], log=log, environment=environment)
            self._server = self._stack.enter_context(server)
            self._name = name
            self._server.wait_ready(START_SECONDS)
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
def fleet(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if vllm_version() is None:
        pytest.skip("vLLM is not installed")
    found = Fleet(checkpoint, tmp_path_factory.mktemp("logs"))
    yield found
    found.stop()


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
