"""`make soak`: a bounded mixed load on the Eigen server, and what must hold after it.

Short, long, shared-prefix, cancelled and malformed requests run at once on a pool too small for
them, so that sequences queue and are preempted. After it no request may have failed, no block may
be in use, no process may have grown, and greedy answers must be those of the unloaded server. The
server computes in float32: in bfloat16 the composition of a batch changes answers by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.processes import Growth, MemoryWatch
from benchmarks.serving.endpoint import Endpoint
from benchmarks.soak_load import Soak, Tally
from calibration.interrupt import terminate_as_interrupt
from calibration.progress import Reporter
from server.process import start
from server.units import parse_size
from vllm_eigen import provenance
from vllm_eigen.errors import EigenError, InputError
from vllm_eigen.files import atomic_file

STARTUP_SECONDS = 600.0
REST_SECONDS = 60.0
WARM_UP = 0.2
"""Share of the requests after which memory is watched."""
NAME = "soak"
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""oneDNN, and PyTorch before it, keep compiled matrix products for the last 1,024 batch shapes,
hundreds of MiB that grow for thousands of requests with any model. Kept small, other growth is
seen."""


@dataclass(frozen=True)
class Verdict:
    """What the soak found; `violations` is empty if all is well."""

    sent: dict[str, int]
    failed: dict[str, int]
    failures: list[str]
    probes: int
    probes_checked: int
    probes_different: int
    preemptions: int
    blocks_at_rest: int
    memory: list[Growth]
    seconds: float
    violations: list[str]


def judge(
    tally: Tally,
    *,
    probes: int,
    blocks_at_rest: int,
    preemptions: int,
    memory: Sequence[Growth],
    max_growth: float,
    seconds: float,
) -> Verdict:
    """Compare what was seen with what must hold; `max_growth` is in percent of a process."""
    wrong = []
    if failed := sum(tally.failed.values()):
        wrong.append(f"{failed} of {sum(tally.sent.values())} requests failed")
    if blocks_at_rest:
        wrong.append(f"{blocks_at_rest} blocks are in use with no request running")
    wrong += [
        f"process {item.name} ({item.pid}) grew by {item.percent:.1f} %"
        for item in memory
        if item.percent > max_growth
    ]
    if tally.probes_different:
        wrong.append(
            f"{tally.probes_different} of {tally.probes_checked} greedy answers changed under load"
        )
    if not tally.probes_checked:
        wrong.append("no greedy answer was compared")
    return Verdict(
        sent=dict(tally.sent),
        failed=dict(tally.failed),
        failures=tally.examples,
        probes=probes,
        probes_checked=tally.probes_checked,
        probes_different=tally.probes_different,
        preemptions=preemptions,
        blocks_at_rest=blocks_at_rest,
        memory=list(memory),
        seconds=round(seconds, 1),
        violations=wrong,
    )


async def soak(
    endpoint: Endpoint, args: argparse.Namespace, watch: MemoryWatch, reporter: Reporter
) -> Verdict:
    """Load a running server and judge it.

    Raises:
        EngineError: the server stopped answering.
        InputError: the model's answers are too uncertain to compare.
    """
    began = time.monotonic()
    cache = endpoint.kv_cache()
    # Shorter than the server's own 5 s: else it may close a connection as it is used again.
    limits = httpx.Limits(max_connections=args.users, keepalive_expiry=2.0)
    async with httpx.AsyncClient(base_url=endpoint.url, timeout=None, limits=limits) as client:
        load = Soak(client, endpoint.model(), args.vocabulary, cache["max_model_len"], args.seed)
        await load.find_probes(args.probes)
        if len(load.probes) < args.probes:
            raise InputError(
                f"only {len(load.probes)} of {args.probes} prompts have a greedy answer without "
                "near ties; pass a smaller --probes"
            )
        reporter.stage("soak", args.requests)
        done, due = 0, 0.0

        def tick() -> None:
            nonlocal done, due
            done += 1
            reporter.step()
            if done == int(args.requests * WARM_UP):
                watch.forget()
            if time.monotonic() >= due:
                due = time.monotonic() + 1.0
                watch.sample()

        await load.run(args.requests, args.minutes * 60, args.users, tick)
        deadline = time.monotonic() + REST_SECONDS
        while (found := endpoint.kv_cache())["blocks"]["used"] and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
    return judge(
        load.tally,
        probes=len(load.probes),
        blocks_at_rest=found["blocks"]["used"],
        preemptions=found["requests"]["preemptions"],
        memory=watch.growths(),
        max_growth=args.max_growth,
        seconds=time.monotonic() - began,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; 0 if everything held."""
    args = _parse(argv)
    try:
        with terminate_as_interrupt(), Reporter() as reporter:
            verdict = _run(args, reporter)
    except EigenError as error:
        print(f"soak: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("soak: interrupted", file=sys.stderr)
        return 130
    document: dict[str, Any] = {
        "ok": not verdict.violations,
        **asdict(verdict),
        "settings": {
            name: value.name if isinstance(value, Path) else value
            for name, value in vars(args).items()
        },
        "provenance": provenance.collect(),
    }
    with atomic_file(args.json) as work:
        work.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for kind, count in verdict.sent.items():
        print(f"{kind:<14} {count:>6} sent {verdict.failed.get(kind, 0):>6} failed")
    for item in verdict.memory:
        print(f"{item.name:<14} {item.end / 2**20:>6.0f} MiB {item.percent:>+6.1f} %")
    print(
        f"{verdict.probes_checked} greedy answers compared, {verdict.probes_different} different; "
        f"{verdict.preemptions} preemptions, {verdict.blocks_at_rest} blocks in use at rest; "
        f"{verdict.seconds:.0f} s"
    )
    for line in [*verdict.failures, *verdict.violations]:
        print(f"soak: {line}", file=sys.stderr)
    print("soak: " + ("FAILED" if verdict.violations else "passed") + f"; {args.json}")
    return int(bool(verdict.violations))


def _run(args: argparse.Namespace, reporter: Reporter) -> Verdict:
    from demo import run as demo

    folder = args.model
    if folder is None:
        folder = args.json.parent / "eigen"
        if not (folder / "config.json").is_file():
            demo.calibrate(0.6, folder)
    try:
        args.vocabulary = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is no model folder: config.json cannot be read") from error
    options = [
        *("--dtype", "float32", "--served-model-name", NAME, "--max-model-len", "1024"),
        *("--kv-cache-memory-bytes", str(parse_size(args.pool)), "--max-logprobs", "5"),
    ]
    reporter.note("starting vLLM ...")
    log = args.json.with_suffix(".log")
    with start(folder, *options, log=log, environment=ENVIRONMENT) as server:
        server.wait_ready(STARTUP_SECONDS)
        watch = MemoryWatch(server.process.pid)
        return asyncio.run(soak(Endpoint(server.url), args, watch, reporter))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", type=Path, help="Eigen checkpoint (the shipped model's)")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=20.0, help="stop earlier after this long")
    parser.add_argument("--users", type=int, default=24, help="requests open at once")
    parser.add_argument("--pool", default="8MiB", help="KV pool")
    parser.add_argument("--probes", type=int, default=8, help="greedy prompts to compare")
    parser.add_argument(
        "--max-growth", type=float, default=2.0, metavar="PERCENT", help="of a process's memory (2)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path(".demo/soak.json"), help="the result")
    args = parser.parse_args(argv)
    if min(args.requests, args.users, args.probes) < 1 or args.minutes <= 0:
        parser.error("--requests, --users, --probes and --minutes must be above zero")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
