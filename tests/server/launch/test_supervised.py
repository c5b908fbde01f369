# SPDX-License-Identifier: Apache-2.0
"""Death of the engine or of the API process under load: clients learn of it, the server is back.

The plain server below a supervisor; each test kills one of its processes in the middle of streams.
`vllm-eigen bench faults` does it twenty times, to workers as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import ENVIRONMENT, NAME, Fleet
from vllm_eigen.benchmarks.soak.faults import (
    Kill,
    Site,
    Stop,
    changes,
    digests,
    kill,
    violations,
)
from vllm_eigen.benchmarks.soak.readiness import Probe, Unready, judge
from vllm_eigen.benchmarks.soak.supervisor import supervised
from vllm_eigen.common.errors import EngineError

pytestmark = pytest.mark.anyio

TOKENS = 1200
"""Of an answer: enough to be generating still when the process is killed."""


@pytest.fixture(scope="module")
def supervised_site(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    server = fleet.get("plain")
    log = tmp_path_factory.mktemp("supervised") / "log"
    environment = {**os.environ, **ENVIRONMENT}
    with supervised(server.process, log, env=environment, cwd=fleet.folder) as supervisor:
        yield Site(supervisor, server.url, NAME)


@pytest.mark.parametrize("part", ["engine", "api"])
@pytest.mark.slow
async def test_a_killed_process_is_noticed_and_replaced(supervised_site: Site, part: str) -> None:
    ends = len(supervised_site.supervisor.statuses)
    found = await kill(supervised_site, part, users=4, tokens=TOKENS)
    assert violations([found], []) == []
    async with httpx.AsyncClient(base_url=supervised_site.url, timeout=60) as client:
        assert (await client.get("/v1/kv_cache")).json()["requests"]["preemptions"] == 0
    assert len(supervised_site.supervisor.statuses) == ends + 1


def test_what_must_not_be_is_found() -> None:
    good = Kill("engine", {"error event": 3, "status 503": 1}, 0.1, 20.0, 1)
    soon, late = Unready(0.2, 0.0, 0.1), Unready(1.1, 0.0, 0.1)
    assert violations([good], [Stop(4, 4, soon, 3.0, 0)]) == []
    silent = Kill("worker", {"cut": 1, "error event": 3}, 0.1, 20.0, 1)
    unnoticed = Kill("api", {"ConnectError": 4}, 0.1, 20.0, 1)
    assert len(violations([silent, unnoticed], [Stop(4, 3, late, 3.0, -15)])) == 5
    hit = Kill("api", {"ReadError": 1, "ConnectError": 3}, 0.1, 20.0, 1)
    assert violations([unnoticed, hit], []) == []


def test_readiness_counts_from_the_signal_to_the_last_acceptance() -> None:
    before = [Probe(9.0, 9.1, 200), Probe(9.1, 9.4, 200)]
    refusal = "the server began to shut down 0.250 s ago"
    after = [
        Probe(10.0, 10.1, 503, "the server began to shut down 0.050 s ago"),  # one of two processes
        Probe(10.1, 10.2, 200),
        Probe(10.2, 10.3, 503, refusal),
        Probe(10.3, 10.4, 503, refusal),
    ]
    assert judge(before, 10.0, after) == Unready(client=0.3, server=0.05, slowest_before=0.3)
    with pytest.raises(EngineError, match="ready after the signal"):
        judge(before, 10.0, after[:2])


def test_changed_files_are_found(tmp_path: Path) -> None:
    for name in ("kept", "changed", "gone"):
        (tmp_path / name).write_text(name)
    before = digests(tmp_path)
    (tmp_path / "changed").write_text("half")
    (tmp_path / "gone").unlink()
    (tmp_path / "new").write_text("")
    assert changes(before, digests(tmp_path)) == [tmp_path / "changed", tmp_path / "gone"]
