# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench faults`: SIGKILL of a server's processes under load, and SIGTERM.

The server runs below a supervisor (`supervisor`). With streams open (`streams`) one of its
processes is killed: every client must learn of it in time, the server must end and be back, and
answer. After SIGTERM readiness must fail within a second (`readiness`), and every accepted request
must complete. No file of the checkpoint, nor one of the cache, may be another than before.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.benchmarks.soak.readiness import BEFORE_SECONDS, Unready, watch
from vllm_eigen.benchmarks.soak.streams import follow, streaming
from vllm_eigen.common.errors import EngineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import httpx

    from vllm_eigen.benchmarks.soak.supervisor import Supervisor
    from vllm_eigen.common.progress import Reporter

HELP = "kill a server's processes under load: errors in time, restart, nothing half written"
PARTS = ("engine", "worker", "api")
TERM = "SIGTERM"
NOTICE_SECONDS = 60.0
"""Within this time every client must know that its request is lost."""
READY_SECONDS = 600.0
UNREADY_SECONDS = 1.0
"""Within this time of SIGTERM `/ready` must fail."""
DRAIN_SECONDS = 300
"""Enough for the answers that run when SIGTERM comes, also on a busy machine."""
START_SECONDS = 120.0
"""Until every stream has its first token."""
TOKENS = 600
NAME = "faults"
LOST = {"error event", "RemoteProtocolError", "ReadError"}
"""How a client learns of it in the middle of an answer."""
REFUSED = {"ConnectError", "status 500", "status 503"}
"""How one does whose answer was complete just before, and who asked for the next."""


@dataclass(frozen=True)
class Kill:
    """What followed a SIGKILL.

    Attributes:
        part: engine, worker or api.
        outcomes: how the clients learned of it, and how many each way.
        notice_seconds: until the last of them knew.
        restart_seconds: from the kill until `/ready` answered again.
        status: of the server's main process.
    """

    part: str
    outcomes: dict[str, int]
    notice_seconds: float
    restart_seconds: float
    status: int


@dataclass(frozen=True)
class Stop:
    """What followed SIGTERM.

    Attributes:
        accepted: requests that ran when it came.
        completed: those of them that were answered whole.
        unready: how `/ready` failed.
        seconds: until the server was gone.
        status: of its main process.
    """

    accepted: int
    completed: int
    unready: Unready
    seconds: float
    status: int


@dataclass
class Record:
    """What was found so far; `errors` are faults after which the server did not come back."""

    kills: list[Kill] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Site:
    """A supervised server."""

    supervisor: Supervisor
    url: str
    model: str

    def client(self, timeout: float | None = None) -> httpx.AsyncClient:
        """A client of the server; without a limit of time by default."""
        import httpx

        return httpx.AsyncClient(base_url=self.url, timeout=timeout)

    def pid(self, part: str) -> int:
        """The process to kill."""
        from vllm_eigen.benchmarks.lib.processes import session_processes

        leader = self.supervisor.process.pid
        if part == "api":
            return leader
        name = {"engine": "EngineCor", "worker": "Worker"}[part]
        [found] = [pid for pid, title in session_processes(leader).items() if name in title]
        return found

    def body(self, tokens: int) -> dict[str, Any]:
        """A request for so many tokens."""
        return {
            "model": self.model, "prompt": [9] * 20, "max_tokens": tokens, "ignore_eos": True,
            "stream": True, "temperature": 0, "stream_options": {"include_usage": True},
        }  # fmt: skip

    async def ready(self) -> None:
        """Wait for `/ready`.

        Raises:
            EngineError: it did not come in time.
        """
        import httpx

        deadline = time.monotonic() + READY_SECONDS
        async with self.client(5.0) as client:
            while time.monotonic() < deadline:
                try:
                    if (await client.get("/ready")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.2)
        raise EngineError(f"the server is not back after {READY_SECONDS:.0f} s")

    async def ended(self, before: int) -> int:
        """Wait for the end that follows `before` others; returns the status.

        Raises:
            EngineError: it did not come in time.
        """
        deadline = time.monotonic() + NOTICE_SECONDS
        while time.monotonic() < deadline:
            if len(self.supervisor.statuses) > before:
                return self.supervisor.statuses[before]
            await asyncio.sleep(0.1)
        raise EngineError("the server did not end")


async def kill(site: Site, part: str, *, users: int, tokens: int) -> Kill:
    """Kill a process of the server in the middle of streams, and wait until it is back.

    Args:
        users: streams at once, each followed by the next until one fails.
        tokens: of each.

    Raises:
        EngineError: the server did not end, or is not back.
        TimeoutError: a client was left waiting.
    """
    await site.ready()
    before = len(site.supervisor.statuses)
    async with streaming(site.url, site.body(tokens), users=users, repeat=True) as load:
        async with asyncio.timeout(START_SECONDS):
            await load.started()
        os.kill(site.pid(part), signal.SIGKILL)
        killed = time.monotonic()
        async with asyncio.timeout(NOTICE_SECONDS):
            outcomes = Counter(await load.outcomes())
        noticed = time.monotonic()
    status = await site.ended(before)
    await site.ready()
    back = time.monotonic()
    async with site.client(NOTICE_SECONDS) as client:
        if (end := await follow(client, site.body(5), asyncio.Event())) != "whole":
            raise EngineError(f"the restarted server does not answer: {end}")
    return Kill(part, dict(outcomes), round(noticed - killed, 2), round(back - killed, 1), status)


async def terminate(site: Site, *, users: int, tokens: int, last: bool = True) -> Stop:
    """SIGTERM in the middle of streams.

    Args:
        last: the supervisor does not start the server again.

    Raises:
        EngineError: the server did not end, or readiness did not fail.
    """
    import httpx

    await site.ready()
    before = len(site.supervisor.statuses)
    pid = site.supervisor.process.pid
    fresh = httpx.Limits(max_keepalive_connections=0)
    async with (
        httpx.AsyncClient(base_url=site.url, timeout=NOTICE_SECONDS, limits=fresh) as prober,
        streaming(site.url, site.body(tokens), users=users, repeat=False) as load,
    ):
        async with asyncio.timeout(START_SECONDS):
            await load.started()
        if last:
            site.supervisor.stop_restarting()
        asked = time.monotonic()
        unready = await watch(prober, lambda: os.kill(pid, signal.SIGTERM), NOTICE_SECONDS)
        async with asyncio.timeout(DRAIN_SECONDS + NOTICE_SECONDS):
            outcomes = await load.outcomes()
    status = await site.ended(before)
    seconds = time.monotonic() - asked - BEFORE_SECONDS
    return Stop(users, outcomes.count("whole"), unready, round(seconds, 1), status)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Eigen checkpoint")
    parser.add_argument("--kills", type=int, default=20, help="in turn of each part (%(default)s)")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERMs between them (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="none after so long (60)")
    parser.add_argument("--users", type=int, default=8, help="streams at once (%(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("faults.json"),
        metavar="FILE.json",
        help="(faults.json)",
    )


def run(args: argparse.Namespace) -> int:
    """Run it; 0 if everything held.

    Raises:
        UsageError: before anything starts.
        EngineError: the server did not start, did not end, or is not back.
    """
    from vllm_eigen.benchmarks.lib.results import collect_provenance, write_json
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    if min(args.kills, args.terms, args.users) < 1:
        raise UsageError("--kills, --terms and --users must be above zero")
    record = Record()

    def save() -> None:
        """After every fault: what was found stays if the run is interrupted."""
        wrong = [*record.errors, *violations(record.kills, record.stops)]
        settings = {name: getattr(args, name) for name in ("kills", "terms", "users")}
        settings |= {"model": args.model.name, "tokens": TOKENS}
        document = {"ok": not wrong, "violations": wrong, **asdict(record), "settings": settings}
        write_json(args.output, {**document, "provenance": collect_provenance()})

    with terminate_as_interrupt(), Reporter() as reporter:
        _server(args, reporter, record, save)
    save()
    wrong = [*record.errors, *violations(record.kills, record.stops)]
    for line in wrong:
        print(f"faults: {line}", file=sys.stderr)
    print("faults: " + ("FAILED" if wrong else "passed") + f"; {args.output}")
    return int(bool(wrong))


def violations(kills: Sequence[Kill], stops: Sequence[Stop]) -> list[str]:
    """What must not be."""
    wrong = []
    for item in kills:
        if not set(item.outcomes) <= LOST | REFUSED:
            wrong.append(f"{item.part}: clients saw {item.outcomes}")
    # A client that lags behind may have its whole answer in buffers when the server dies, and lose
    # none; but not always.
    lost = {item.part for item in kills if set(item.outcomes) & LOST}
    wrong += [f"{part}: no kill hit an answer" for part in sorted({k.part for k in kills} - lost)]
    for stop in stops:
        if stop.completed != stop.accepted:
            wrong.append(f"{stop.accepted - stop.completed} accepted requests did not complete")
        if stop.status != 0:
            wrong.append(f"SIGTERM ended the server with status {stop.status}")
        if stop.unready.client > UNREADY_SECONDS:
            wrong.append(f"readiness failed {stop.unready.client:.1f} s after SIGTERM")
    return wrong


def order(kills: int, terms: int) -> list[str]:
    """Kills of each part in turn, with SIGTERMs evenly between them, the last of all a SIGTERM."""
    parts = [(number / kills, PARTS[number % len(PARTS)]) for number in range(kills)]
    stops = [((number + 1) / terms, TERM) for number in range(terms)]
    return [fault for _, fault in sorted(parts + stops, key=lambda item: item[0])]


def changes(before: Mapping[Path, str], after: Mapping[Path, str]) -> list[Path]:
    """Files of `before` that are gone or have other contents."""
    return [path for path, digest in before.items() if after.get(path) != digest]


def digests(folder: Path) -> dict[Path, str]:
    """SHA-256 of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _server(
    args: argparse.Namespace, reporter: Reporter, record: Record, save: Callable[[], None]
) -> None:
    """Start the server, do it, stop it."""
    from vllm_eigen.benchmarks.lib.servers import running, set_environment
    from vllm_eigen.benchmarks.soak.supervisor import supervised
    from vllm_eigen.common.cache import user_cache

    options = [
        *("--served-model-name", NAME, "--max-model-len", "1024", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--shutdown-timeout", str(DRAIN_SECONDS)),
    ]
    set_environment(args.model)
    checkpoint = digests(args.model)
    reporter.note("starting vLLM ...")
    log = args.output.with_suffix(".log")
    faults = order(args.kills, args.terms)
    deadline = time.monotonic() + args.minutes * 60
    with (
        running(args.model, *options, log=log) as server,
        supervised(server.process, log) as supervisor,
    ):
        site = Site(supervisor, server.url, NAME)
        kernels = digests(user_cache())
        reporter.stage("faults", len(faults))
        for number, fault in enumerate(faults, 1):
            load = {"users": args.users, "tokens": TOKENS}
            try:
                if fault == TERM:
                    stop = terminate(site, **load, last=number == len(faults))
                    record.stops.append(asyncio.run(stop))
                    reporter.note(str(record.stops[-1]))
                else:
                    record.kills.append(asyncio.run(kill(site, fault, **load)))
                    reporter.note(str(record.kills[-1]))
            except (EngineError, TimeoutError) as error:
                why = error or "no answer in time"
                record.errors.append(f"{fault}, {number} of {len(faults)}: {why}")
                reporter.note(record.errors[-1])
            save()
            reporter.step()
            if time.monotonic() > deadline:
                break
    changed = changes(kernels, digests(user_cache()))
    record.errors += [f"{path.name} in the cache has changed" for path in changed]
    if digests(args.model) != checkpoint:
        record.errors.append("a file of the checkpoint has changed")
