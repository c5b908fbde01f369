"""A process supervisor with what matters of compose's `restart: unless-stopped`.

The command is started again whenever its main process ends, whatever its status, after a delay
that doubles from a tenth of a second; and as in a container, nothing it started outlives it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


class Supervisor:
    """Keeps one command running in its own session; see `supervised`."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._command, self._log, self._environment = command, log, environment
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.statuses: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No more restarts, and an end to what runs."""
        self._stopped.set()
        if self.process is not None:
            _end_group(self.process.pid)
        self._thread.join(30)

    def _loop(self) -> None:
        delay = 0.1
        while not self._stopped.is_set():
            with self._log.open("ab") as sink:
                self.process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self._environment},
                    start_new_session=True,
                )
            self.statuses.append(self.process.wait())
            _end_group(self.process.pid)
            self._stopped.wait(delay)
            delay *= 2


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def supervised(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Iterator[Supervisor]:
    """Keep `command` running while the block lasts."""
    found = Supervisor(command, log, environment)
    found.start()
    try:
        yield found
    finally:
        found.stop()
