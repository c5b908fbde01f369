# SPDX-License-Identifier: Apache-2.0
"""A `vllm-eigen serve` subprocess with bounded start and stop, for demos, benchmarks and tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_eigen.common.errors import EngineError

STOP_SECONDS = 20.0


def can_compile() -> bool:
    """Whether torch.compile works here; it fails below a path with spaces."""
    return not any(" " in path for path in (sys.prefix, str(Path.home())))


def free_port() -> int:
    """A TCP port on 127.0.0.1 that is free right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A running server on 127.0.0.1; see `start`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, timeout: float = 10.0) -> Any:
        """Body of a GET request, decoded from JSON where it is JSON."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=timeout) as response:
            body = response.read()
        return json.loads(body) if body[:1] in (b"{", b"[") else body.decode()

    def wait_ready(self, seconds: float, poll: Callable[[], None] = lambda: None) -> None:
        """Return once `/health` answers; `poll` is called while waiting.

        Raises:
            EngineError: the process ended, or the time is over; names the log file.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise EngineError(
                    f"the server ended with status {self.process.returncode}: {self.last_error()}"
                    f"; see {self.log}"
                )
            with contextlib.suppress(OSError, urllib.error.URLError):
                self.get("/health", timeout=2.0)
                return
            poll()
            time.sleep(0.25)
        raise EngineError(f"the server was not ready after {seconds:.0f} s; see {self.log}")

    def last_error(self) -> str:
        """The last line of the log that names an error, else the last line."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or line.startswith("vllm-eigen")]
        return (errors or lines or ["nothing was logged"])[-1].strip()

    def stop(self) -> None:
        """End the server and everything it started: terminate, and kill after `STOP_SECONDS`."""
        group = self.process.pid
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal_number)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            if not _group_alive(group, STOP_SECONDS):
                return


@contextlib.contextmanager
def start(
    model: str | Path,
    *options: str,
    log: Path,
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = ("vllm_eigen.cli", "serve"),
    folder: Path | None = None,
) -> Iterator[ServerProcess]:
    """Start a server for `model` on 127.0.0.1, and stop it when the block ends.

    Args:
        model: checkpoint folder or hub id.
        options: vLLM flags.
        log: file that receives the server's output.
        port: TCP port; a free one by default.
        environment: variables added to this process's.
        folder: working directory; this process's by default.
        program: module to run and its arguments before the model, e.g. vLLM's own server.
    """
    port = free_port() if port is None else port
    command: Sequence[str] = (
        sys.executable,
        "-m",
        *program,
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *options,
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=folder,
            start_new_session=True,
        )
    server = ServerProcess(process, port, log)
    try:
        yield server
    finally:
        server.stop()


def _group_alive(group: int, seconds: float) -> bool:
    """Whether a process of the group still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True
