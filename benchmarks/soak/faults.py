# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench faults`: SIGKILL of a server's processes under load, and SIGTERM at the end.

The server runs below a supervisor (`supervisor`). With streams open one of its processes is killed:
every client must learn of it in time, the server must end and be back, and answer. SIGTERM comes
last: readiness must fail, and every accepted request must complete.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.common.errors import EngineError, UsageError

if TYPE_CHECKING:
    import httpx

    from vllm_eigen.benchmarks.soak.supervisor import Supervisor

HELP = "kill a server's processes under load: errors in time, restart, nothing half written"
PARTS = ("engine", "worker", "api")
NOTICE_SECONDS = 60.0
"""Within this time every client must know that its request is lost."""
READY_SECONDS = 240.0
DRAIN_SECONDS = 120
"""Enough for the answers that run when SIGTERM comes, also on a busy machine."""
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
    """What followed SIGTERM: requests accepted before, those that completed, seconds."""

    accepted: int
    completed: int
    unready_seconds: float
    seconds: float
    status: int


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


async def follow(client: httpx.AsyncClient, body: dict[str, Any], first: asyncio.Event) -> str:
    """Follow a stream; returns how it ended: `whole`, `error event`, `cut` or an exception."""
    import httpx

    seen = "cut"
    tokens = 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return f"status {answer.status_code}"
            async for line in answer.aiter_lines():
                first.set()
                if line.startswith("data: [DONE]"):
                    whole = tokens == body["max_tokens"] and seen == "cut"
                    return "whole" if whole else seen
                if '"error"' in line:
                    seen = "error event"
                elif '"usage":{' in line.replace(" ", ""):
                    tokens = json.loads(line.removeprefix("data:"))["usage"]["completion_tokens"]
    except httpx.TransportError as error:
        return type(error).__name__
    return seen


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

    async def user(client: httpx.AsyncClient, first: asyncio.Event) -> str:
        while (outcome := await follow(client, site.body(tokens), first)) == "whole":
            pass
        return outcome

    async with site.client() as client:
        starts = [asyncio.Event() for _ in range(users)]
        streams = [asyncio.create_task(user(client, event)) for event in starts]
        async with asyncio.timeout(NOTICE_SECONDS):
            await asyncio.gather(*(event.wait() for event in starts))
        os.kill(site.pid(part), signal.SIGKILL)
        killed = time.monotonic()
        async with asyncio.timeout(NOTICE_SECONDS):
            outcomes = Counter(await asyncio.gather(*streams))
        noticed = time.monotonic()
    status = await site.ended(before)
    await site.ready()
    back = time.monotonic()
    async with site.client(NOTICE_SECONDS) as client:
        if (end := await follow(client, site.body(5), asyncio.Event())) != "whole":
            raise EngineError(f"the restarted server does not answer: {end}")
    return Kill(part, dict(outcomes), round(noticed - killed, 2), round(back - killed, 1), status)


async def terminate(site: Site, *, users: int, tokens: int) -> Stop:
    """SIGTERM in the middle of streams.

    Raises:
        EngineError: the server did not end.
        TimeoutError: readiness did not fail.
    """
    await site.ready()
    before = len(site.supervisor.statuses)
    async with site.client() as client, site.client(5.0) as prober:
        starts = [asyncio.Event() for _ in range(users)]
        streams = [
            asyncio.create_task(follow(client, site.body(tokens), event)) for event in starts
        ]
        async with asyncio.timeout(NOTICE_SECONDS):
            await asyncio.gather(*(event.wait() for event in starts))
        site.supervisor.stop_restarting()
        os.kill(site.supervisor.process.pid, signal.SIGTERM)
        asked = time.monotonic()
        async with asyncio.timeout(NOTICE_SECONDS):
            while (await prober.get("/ready")).status_code == 200:
                await asyncio.sleep(0.05)
        unready = time.monotonic()
        async with asyncio.timeout(DRAIN_SECONDS + NOTICE_SECONDS):
            outcomes = await asyncio.gather(*streams)
    status = await site.ended(before)
    done = outcomes.count("whole")
    seconds = time.monotonic() - asked
    return Stop(users, done, round(unready - asked, 2), round(seconds, 1), status)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Eigen checkpoint")
    parser.add_argument("--kills", type=int, default=20, help="in turn of each part (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="no kill after so long")
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

    if min(args.kills, args.users) < 1:
        raise UsageError("--kills and --users must be above zero")
    before = _digest(args.model)
    with terminate_as_interrupt(), Reporter() as reporter:
        kills, stop = _server(args, reporter)
    wrong = violations(kills, stop)
    if _digest(args.model) != before:
        wrong.append("a file of the checkpoint has changed")
    document = {
        "ok": not wrong, "violations": wrong, "kills": [asdict(item) for item in kills],
        "stop": asdict(stop), "provenance": collect_provenance(),
        "settings": {"model": args.model.name, "kills": args.kills, "users": args.users},
    }  # fmt: skip
    write_json(args.output, document)
    for item in [*kills, stop]:
        print(item)
    for line in wrong:
        print(f"faults: {line}", file=sys.stderr)
    print("faults: " + ("FAILED" if wrong else "passed") + f"; {args.output}")
    return int(bool(wrong))


def violations(kills: list[Kill], stop: Stop | None) -> list[str]:
    """What must not be."""
    wrong = []
    for item in kills:
        if not set(item.outcomes) <= LOST | REFUSED or not set(item.outcomes) & LOST:
            wrong.append(f"{item.part}: clients saw {item.outcomes}")
    if stop is not None:
        if stop.completed != stop.accepted:
            wrong.append(f"{stop.accepted - stop.completed} accepted requests did not complete")
        if stop.status != 0:
            wrong.append(f"SIGTERM ended the server with status {stop.status}")
    return wrong


def _server(args: argparse.Namespace, reporter: Any) -> tuple[list[Kill], Stop]:
    """Start the server, do it, stop it."""
    from vllm_eigen.benchmarks.lib.servers import running, set_environment
    from vllm_eigen.benchmarks.soak.supervisor import supervised

    options = [
        *("--served-model-name", NAME, "--max-model-len", "1024", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--shutdown-timeout", str(DRAIN_SECONDS)),
    ]
    set_environment(args.model)
    reporter.note("starting vLLM ...")
    log = args.output.with_suffix(".log")
    with (
        running(args.model, *options, log=log) as server,
        supervised(server.process, log) as supervisor,
    ):
        site = Site(supervisor, server.url, NAME)
        reporter.stage("kills", args.kills)
        kills: list[Kill] = []
        deadline = time.monotonic() + args.minutes * 60
        for number in range(args.kills):
            if time.monotonic() > deadline:
                break
            part = PARTS[number % len(PARTS)]
            kills.append(asyncio.run(kill(site, part, users=args.users, tokens=900)))
            reporter.step()
        return kills, asyncio.run(terminate(site, users=args.users, tokens=900))


def _digest(folder: Path) -> str:
    """Of names and contents below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()
