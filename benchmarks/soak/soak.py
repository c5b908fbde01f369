# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench soak`: a bounded mixed load on an Eigen server, and what must hold after it.

Short, long, shared-prefix, cancelled and malformed requests (`load`) run at once on a pool too
small for them, so that sequences queue and are preempted. After it no request may have failed, no
block may be in use, no process may have grown, and greedy answers must be those of the unloaded
server (`verdict`). The server computes in float32: in bfloat16 the composition of a batch changes
answers by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_eigen.common.errors import InputError, UsageError

if TYPE_CHECKING:
    from vllm_eigen.benchmarks.lib.endpoint import Endpoint
    from vllm_eigen.benchmarks.lib.processes import MemoryWatch
    from vllm_eigen.benchmarks.soak.verdict import Verdict
    from vllm_eigen.common.progress import Reporter

HELP = "a long mixed load on an Eigen server: failures, leaks, changed answers"
REST_SECONDS = 60.0
WARM_UP = 0.2
"""Share of the requests after which memory is watched."""
NAME = "soak"
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""oneDNN, and PyTorch before it, keep compiled matrix products for the last 1,024 batch shapes,
hundreds of MiB that grow for thousands of requests with any model. Kept small, other growth is
seen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Eigen checkpoint")
    parser.add_argument("--requests", type=int, default=5000, help="to send (%(default)s)")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop earlier after this long")
    parser.add_argument("--users", type=int, default=24, help="requests open at once")
    parser.add_argument("--pool", default="8MiB", help="KV pool")
    parser.add_argument("--probes", type=int, default=8, help="greedy prompts to compare")
    parser.add_argument(
        "--max-growth", type=float, default=2.0, metavar="PERCENT", help="of a process's memory (2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("soak.json"), metavar="FILE.json", help="(soak.json)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the soak; 0 if everything held.

    Raises:
        UsageError, InputError: before anything starts.
        EngineError: the server did not start or stopped answering.
    """
    from vllm_eigen.benchmarks.lib.results import collect_provenance, write_json
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    if min(args.requests, args.users, args.probes) < 1 or args.minutes <= 0:
        raise UsageError("--requests, --users, --probes and --minutes must be above zero")
    with terminate_as_interrupt(), Reporter() as reporter:
        verdict = _soak_server(args, reporter)
    names = ("model", "requests", "minutes", "users", "pool", "probes", "max_growth", "seed")
    settings = {name: getattr(args, name) for name in names} | {"model": args.model.name}
    document = {"ok": not verdict.violations, **asdict(verdict), "settings": settings}
    write_json(args.output, {**document, "provenance": collect_provenance()})
    print("\n".join(verdict.lines()))
    for line in [*verdict.failures, *verdict.violations]:
        print(f"soak: {line}", file=sys.stderr)
    print("soak: " + ("FAILED" if verdict.violations else "passed") + f"; {args.output}")
    return int(bool(verdict.violations))


async def soak(
    endpoint: Endpoint,
    args: argparse.Namespace,
    vocabulary: int,
    watch: MemoryWatch,
    reporter: Reporter,
) -> Verdict:
    """Load a running server and judge it.

    Args:
        vocabulary: token ids of the model.

    Raises:
        EngineError: the server stopped answering.
        InputError: the model's answers are too uncertain to compare.
    """
    import httpx

    from vllm_eigen.benchmarks.soak.load import SoakLoad
    from vllm_eigen.benchmarks.soak.verdict import judge

    began = time.monotonic()
    cache = endpoint.kv_cache()
    # A new connection a request: the server may close an idle one just as it is used again, and
    # where the machine has other work that would look like a lost request.
    limits = httpx.Limits(max_connections=args.users, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=endpoint.url, timeout=None, limits=limits) as client:
        load = SoakLoad(client, endpoint.model(), vocabulary, cache["max_model_len"], args.seed)
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


def _soak_server(args: argparse.Namespace, reporter: Reporter) -> Verdict:
    """Start the server, soak it, stop it."""
    from vllm_eigen.benchmarks.lib.endpoint import Endpoint
    from vllm_eigen.benchmarks.lib.processes import MemoryWatch
    from vllm_eigen.benchmarks.lib.servers import running, set_environment
    from vllm_eigen.common.sizes import parse_size

    try:
        config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
        vocabulary = int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{args.model} is no model folder: config.json cannot be read") from error
    options = [
        *("--dtype", "float32", "--served-model-name", NAME, "--max-model-len", "1024"),
        *("--kv-cache-memory-bytes", str(parse_size(args.pool)), "--max-logprobs", "5"),
    ]
    set_environment(args.model)
    reporter.note("starting vLLM ...")
    log = args.output.with_suffix(".log")
    with running(args.model, *options, log=log, environment=ENVIRONMENT) as server:
        watch = MemoryWatch(server.process.pid)
        return asyncio.run(soak(Endpoint(server.url), args, vocabulary, watch, reporter))
