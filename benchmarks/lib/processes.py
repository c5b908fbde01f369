# SPDX-License-Identifier: Apache-2.0
"""Resident memory and CPU time of a server's processes."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Growth:
    """Memory of one process over the time it was watched, bytes.

    Attributes:
        start, end: medians over the first and the last tenth of the samples.
        peak: the largest sample.
        series: at most sixty samples, evenly spaced.
    """

    pid: int
    name: str
    start: int
    end: int
    peak: int
    series: tuple[int, ...]

    @property
    def growth(self) -> int:
        """How much it grew; negative if it shrank."""
        return self.end - self.start

    @property
    def percent(self) -> float:
        """Growth, of the memory at the start."""
        return 100 * self.growth / max(self.start, 1)


def session_processes(session: int) -> dict[int, str]:
    """Processes of a session by id, with their names; a server started here leads its own."""
    found = {}
    for process in psutil.process_iter(["name", "status"]):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found[process.pid] = str(process.info["name"])
    return found


def resident_bytes(pid: int) -> int | None:
    """Memory of a process that is in RAM, or None if it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def cpu_seconds(pid: int) -> float:
    """CPU time of a process's living threads so far, to the nanosecond; 0 if it has ended."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[0])
        except (OSError, IndexError):  # the thread ended meanwhile
            continue
    return total / 1e9


class MemoryWatch:
    """Samples the memory of every process of a session."""

    def __init__(self, session: int) -> None:
        self._session = session
        self._names: dict[int, str] = {}
        self._samples: dict[int, list[int]] = {}

    def sample(self) -> None:
        """Take one sample of each process."""
        for pid, name in session_processes(self._session).items():
            size = resident_bytes(pid)
            if size is not None:
                self._names[pid] = name
                self._samples.setdefault(pid, []).append(size)

    def forget(self) -> None:
        """Drop the samples: the warm-up is over."""
        self._samples.clear()

    def growths(self) -> list[Growth]:
        """One entry a process, largest growth first."""
        found = [
            Growth(pid, self._names[pid], *_ends(sizes), max(sizes), _thinned(sizes))
            for pid, sizes in self._samples.items()
        ]
        return sorted(found, key=lambda item: -item.growth)


def _ends(sizes: Sequence[int]) -> tuple[int, int]:
    part = max(1, len(sizes) // 10)
    return round(statistics.median(sizes[:part])), round(statistics.median(sizes[-part:]))


def _thinned(sizes: Sequence[int], points: int = 60) -> tuple[int, ...]:
    step = max(1, -(-len(sizes) // points))
    return tuple(sizes[::step])
