# SPDX-License-Identifier: Apache-2.0
"""A process supervisor with what matters of compose's `restart: unless-stopped`.

The command is started again whenever its main process ends, whatever its status, after a delay
that doubles from a tenth of a second until it has run for ten; and as in a container, nothing it
started outlives it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIRST_DELAY = 0.1
STEADY_SECONDS = 10.0
"""A command that ran for so long is restarted after the first delay again, as Docker does it."""


class Supervisor:
    """Restarts a running command that has its own session; see `supervised`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, **options: Any) -> None:
        self.process = process
        self.statuses: list[int] = []
        self._log, self._options = log, options
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self) -> None:
        """Wait for the end of what runs, in a thread."""
        self._thread.start()

    def stop_restarting(self) -> None:
        """The end of what runs is the last."""
        self._stopped.set()

    def stop(self) -> None:
        """No more restarts, and an end to what runs."""
        self._stopped.set()
        _end_group(self.process.pid)
        self._thread.join(30)

    def _loop(self) -> None:
        delay = FIRST_DELAY
        while True:
            began = time.monotonic()
            self.statuses.append(self.process.wait())
            _end_group(self.process.pid)
            if time.monotonic() - began > STEADY_SECONDS:
                delay = FIRST_DELAY
            if self._stopped.wait(delay):
                return
            delay *= 2
            with self._log.open("ab") as sink:
                self.process = subprocess.Popen(
                    self.process.args,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    **self._options,
                )


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def supervised(process: subprocess.Popen[bytes], log: Path, **options: Any) -> Iterator[Supervisor]:
    """Keep the command of `process` running while the block lasts.

    Args:
        process: what runs already, the leader of its session.
        log: output of the restarts.
        options: for `Popen`, as `process` was started.
    """
    supervisor = Supervisor(process, log, **options)
    supervisor.start()
    try:
        yield supervisor
    finally:
        supervisor.stop()
