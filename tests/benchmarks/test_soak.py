# SPDX-License-Identifier: Apache-2.0
"""The soak test's own test: it passes a good server and finds each fault of a bad one."""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.benchmarks.fake_server import Fake, serving
from vllm_eigen.benchmarks.lib.endpoint import Endpoint
from vllm_eigen.benchmarks.lib.processes import (
    Growth,
    MemoryWatch,
    resident_bytes,
    session_processes,
)
from vllm_eigen.benchmarks.soak import soak as soak_module
from vllm_eigen.benchmarks.soak.load import Tally
from vllm_eigen.benchmarks.soak.soak import soak
from vllm_eigen.benchmarks.soak.verdict import Verdict, judge
from vllm_eigen.common.progress import Reporter

KINDS = {"short", "long", "shared prefix", "cancelled", "malformed", "probe"}


def run(fake: Fake, **changes: Any) -> Verdict:
    values: dict[str, Any] = {
        "requests": 120, "minutes": 1.0, "users": 8, "probes": 2, "seed": 1,
        "max_growth": 50.0,
    }  # fmt: skip
    args = argparse.Namespace(**(values | changes))
    with serving(fake), Reporter(quiet=True) as reporter:
        watch = MemoryWatch(os.getsid(0))
        return asyncio.run(soak(Endpoint(fake.url), args, 50, watch, reporter))


def test_a_good_server_passes() -> None:
    verdict = run(Fake(slots=8, delay=0.0001))
    assert not verdict.violations
    assert sum(verdict.sent.values()) == 120
    assert set(verdict.sent) == KINDS
    assert verdict.probes_checked > 0
    assert not verdict.failed


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"fail_every": 5}, "requests failed"),
        ({"leak": 3}, "3 blocks are in use"),
        ({"drift_after": 20}, "greedy answers changed"),
        ({"lenient": True}, "requests failed"),
    ],
)
def test_each_fault_is_found(
    fault: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_module, "REST_SECONDS", 1.0)
    # Probes are asked first, so no fault may hit those.
    verdict = run(Fake(slots=8, delay=0.0001, **fault))
    assert len(verdict.violations) == 1
    assert message in verdict.violations[0]


def test_time_ends_a_soak() -> None:
    began = time.monotonic()
    verdict = run(Fake(slots=8, delay=0.0001), requests=10**6, minutes=1 / 60)
    assert 0 < sum(verdict.sent.values()) < 10**6
    assert time.monotonic() - began < 60


def test_growth_and_missing_probes_are_violations() -> None:
    tally = Tally()
    found = judge(
        tally, probes=1, blocks_at_rest=0, preemptions=0, max_growth=2.0, seconds=1.0,
        memory=[Growth(1, "big", 1000, 1021, 1021, ()), Growth(2, "small", 1000, 1019, 1030, ())],
    )  # fmt: skip
    assert [line.split(" (")[0] for line in found.violations] == [
        "process big", "no greedy answer was compared",
    ]  # fmt: skip


def test_memory_of_a_session_is_watched() -> None:
    code = (
        "import sys; print(flush=True); sys.stdin.readline(); "
        "block = bytearray(b'x') * (64 << 20); print(flush=True); sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        assert list(session_processes(process.pid)) == [process.pid]
        watch = MemoryWatch(process.pid)
        watch.sample()
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        watch.sample()
        [growth] = watch.growths()
        assert 60 << 20 < growth.growth < 80 << 20
        assert growth.peak == growth.end
        watch.forget()
        assert watch.growths() == []
    finally:
        process.kill()
        process.wait()
    assert resident_bytes(process.pid) is None
    assert session_processes(process.pid) == {}
