# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench overheads`: start-up, routes and statistics, and bases left unfolded.

Each row is a ratio of two servers taken pair by pair: starts alternate, and under load both servers
run and take turns, so that a machine that slows down slows both. Rows are kept in the output file
as soon as they are measured; a later run replaces those it measures again.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from vllm_eigen.common.errors import EngineError, UsageError

if TYPE_CHECKING:
    from vllm_eigen.benchmarks.engine.overhead_report import Overhead
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.server.launch.process import ServerProcess

HELP = "what start-up, statistics and bases left unfolded cost"
NAME = "overheads"
PROMPTS = ("Return a new array of", "This module provides a", "Raise an exception if the")
WARM_UP = 2
"""Pairs of loads that are not counted."""
OPTIONS = ("--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", NAME)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from vllm_eigen.benchmarks.lib.arguments import add_output

    parser.add_argument("--base", type=Path, metavar="DIR", help="uncompressed model")
    parser.add_argument("--text", type=Path, metavar="FILE", help="calibration text")
    parser.add_argument(
        "--kv-ratio", type=float, default=0.6, help="of the checkpoint (%(default)s)"
    )
    parser.add_argument("--starts", type=int, default=5, help="pairs of starts (%(default)s)")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of loads (%(default)s)")
    parser.add_argument("--users", type=int, default=8, help="requests open at once (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="output tokens of each user")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and write.

    Raises:
        UsageError: options are missing, or counts too small for quartiles.
        EngineError: a server or the calibration failed; finished rows are kept.
    """
    from vllm_eigen.benchmarks.engine.overhead_report import markdown, save, stored
    from vllm_eigen.benchmarks.lib.arguments import require
    from vllm_eigen.benchmarks.lib.results import collect_provenance
    from vllm_eigen.benchmarks.lib.servers import set_environment
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    output = args.output
    if args.earlier is not None:
        output, rows = args.earlier, stored(args.earlier)
        save(output, rows)
    else:
        require(args, "base", "text", "output")
        if not all(count == 0 or count > 1 for count in (args.starts, args.pairs)):
            raise UsageError("--starts and --pairs must be at least 2, or 0 to leave them out")
        set_environment(args.base)
        made, rows = collect_provenance(), stored(output)
        with TemporaryDirectory() as work, terminate_as_interrupt(), Reporter() as reporter:
            for row in measure(args, Path(work), reporter):
                rows[row.what] = asdict(row) | {"provenance": made}
                save(output, rows)
                reporter.note(f"{row.what}: {row.median:.3f} ({row.low:.3f} to {row.high:.3f})")
    print(markdown(rows.values()))
    return 0


def measure(args: argparse.Namespace, work: Path, reporter: Reporter) -> Iterator[Overhead]:
    """One row after the other."""
    from vllm_eigen.benchmarks.lib.servers import VLLM_SERVE, running

    base = args.base
    folded = _calibrate(args, work / "folded", reporter=reporter)
    bases = _calibrate(args, work / "bases", "--bases-only", reporter=reporter)
    if args.starts:
        yield startup(base, folded, work, args.starts, reporter)
    if not args.pairs:
        return
    own = {"VLLM_PLUGINS": "eigen"}  # the models without our routes
    with (
        running(folded, *OPTIONS, log=work / "1.log", environment=own, program=VLLM_SERVE) as one,
        running(folded, *OPTIONS, log=work / "2.log") as other,
        read_stream(other),
    ):
        what = "decode, routes and statistics against vLLM's server alone"
        yield from decode(what, one, other, args, reporter)
    with (
        running(folded, *OPTIONS, log=work / "3.log") as one,
        running(base, *OPTIONS, "--eigen-bases", str(bases), log=work / "4.log") as other,
    ):
        yield decode("decode, bases only against folded", one, other, args, reporter)[0]


def startup(base: Path, eigen: Path, logs: Path, pairs: int, reporter: Reporter) -> Overhead:
    """Seconds from the command to an answer of `/health`, alternately; the first pair is left out.

    That pair fills the caches: torch's compiled graphs of either model, our compiled kernels.
    """
    from vllm_eigen.benchmarks.engine.overhead_report import Overhead
    from vllm_eigen.benchmarks.lib.pairs import alternate
    from vllm_eigen.benchmarks.lib.servers import running

    def seconds(side: int) -> float:
        began = time.monotonic()
        with running((base, eigen)[side], *OPTIONS, log=logs / "startup.log"):
            return time.monotonic() - began

    reporter.stage("start-up", 2 * (pairs + 1))
    one, other = alternate(seconds, pairs, 1, reporter.step)
    return Overhead.of("start-up, Eigen against base", "s", one, other)


def decode(
    what: str, one: ServerProcess, other: ServerProcess, args: argparse.Namespace, report: Reporter
) -> tuple[Overhead, Overhead]:
    """Output tokens a second of two running servers, alternately, and their API's CPU time a token.

    Throughput varies from load to load by more than small overheads on a shared machine; the CPU
    time of the process that has them bounds what they can take from it.
    """
    from vllm_eigen.benchmarks.engine.overhead_report import Overhead
    from vllm_eigen.benchmarks.lib.decoding import tokens_per_second
    from vllm_eigen.benchmarks.lib.endpoint import Endpoint
    from vllm_eigen.benchmarks.lib.pairs import alternate
    from vllm_eigen.benchmarks.lib.processes import cpu_seconds

    servers = (one, other)
    clients = [Endpoint(server.url).openai() for server in servers]
    spent: tuple[list[float], list[float]] = ([], [])

    def speed(side: int) -> float:
        pid = servers[side].process.pid
        before = cpu_seconds(pid)
        found = tokens_per_second(
            clients[side], NAME, PROMPTS, users=args.users, tokens=args.tokens
        )
        spent[side].append(1e6 * (cpu_seconds(pid) - before) / (args.users * args.tokens))
        return found

    report.stage(what, 2 * (args.pairs + WARM_UP))
    speeds = alternate(speed, args.pairs, WARM_UP, report.step)
    return (
        Overhead.of(what, "tokens/s", *speeds),
        Overhead.of(f"{what}: CPU time of the API", "us/token", *(s[WARM_UP:] for s in spent)),
    )


@contextlib.contextmanager
def read_stream(server: ServerProcess) -> Iterator[None]:
    """Read the live statistics all the while, as an open dashboard does.

    Raises:
        EngineError: nothing came.
    """
    events = 0

    def read() -> None:
        nonlocal events
        with contextlib.suppress(OSError, ValueError):  # closed at the end
            for line in stream:
                events += line.startswith(b"data:")

    stream = urllib.request.urlopen(f"{server.url}/v1/kv_cache/stream", timeout=60)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stream.fp.raw._sock.shutdown(2)
        reader.join(10.0)
    if not events:
        raise EngineError(f"{server.url}/v1/kv_cache/stream sent nothing")


def _calibrate(args: argparse.Namespace, folder: Path, *options: str, reporter: Reporter) -> Path:
    from vllm_eigen import cli

    reporter.note(f"calibrating {folder.name} ...")
    arguments = ["calibrate", str(args.base), "--output", str(folder), "--text", str(args.text)]
    arguments += ["--kv-ratio", str(args.kv_ratio), "--samples", "32"]
    arguments += ["--seq-len", "512", "--method", "sensitivity", "--quiet"]
    if cli.main([*arguments, *options]):
        raise EngineError("calibration failed, see above")
    return folder
