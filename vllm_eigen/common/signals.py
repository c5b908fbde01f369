# SPDX-License-Identifier: Apache-2.0
"""Signals during long work: SIGTERM unwinds like Ctrl-C, so that nothing half-written stays."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_seen: list[int] = []


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """While open, SIGINT and SIGTERM raise KeyboardInterrupt in the main thread.

    It leaves the block as such even if native code on the way turned it into another error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        _seen.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    except Exception as error:
        if _seen:
            raise KeyboardInterrupt from error
        raise
    finally:
        _seen.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def check_interrupted() -> None:
    """Raise a signal's KeyboardInterrupt again if Python has dropped it.

    It drops what is raised in a finalizer or in a callback of the garbage collector.
    """
    if _seen:
        raise KeyboardInterrupt
