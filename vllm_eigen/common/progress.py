# SPDX-License-Identifier: Apache-2.0
"""Progress on standard error: one bar with stage and time left, or plain lines without a terminal.

Fits 60 columns.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vllm_eigen.common.signals import check_interrupted


class Reporter:
    """Shows the stages of a long command. A context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Reporter:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of `total` steps; the one before is complete."""
        if self._task is not None:
            self._progress.update(self._task, completed=self._progress.tasks[-1].total)
        self._task = self._progress.add_task(name, total=max(1, total))
        if not self._console.is_terminal:
            self.note(f"{name} ...")

    def step(self, steps: int = 1) -> None:
        """Some steps of the stage are done.

        Raises:
            KeyboardInterrupt: a signal asked to stop, and its exception was lost.
        """
        check_interrupted()
        if self._task is not None:
            self._progress.advance(self._task, steps)

    def note(self, line: str) -> None:
        """A line for the person watching."""
        self._console.print(line, soft_wrap=True, markup=False)
