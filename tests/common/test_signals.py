# SPDX-License-Identifier: Apache-2.0
"""Signals during long work."""

from __future__ import annotations

import os
import signal

import pytest

from vllm_eigen.common.progress import Reporter
from vllm_eigen.common.signals import terminate_as_interrupt


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_lost_in_a_finalizer_ends_the_work_at_its_next_step() -> None:
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass

    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt(), Reporter(quiet=True) as work:
        Finalized()  # Python prints what a finalizer raises, and goes on
        work.step()
