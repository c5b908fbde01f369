"""What the parts cost that are not attention: start-up, statistics, and bases left unfolded.

`python -m benchmarks.overheads --output FILE.json` uses the shipped model, or `--base MODEL --text
FILE`, and writes a table beside the JSON. Each row is a ratio of two servers taken pair by pair:
starts alternate, and under load both servers run and take turns, so that a machine that slows down
slows both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.decoding import tokens_per_second
from benchmarks.pairs import Ratio, by_turns
from benchmarks.processes import cpu_seconds
from calibration.interrupt import terminate_as_interrupt
from calibration.progress import Reporter
from server.process import ServerProcess, start
from vllm_eigen import cli, provenance
from vllm_eigen.errors import EigenError, EngineError
from vllm_eigen.files import atomic_file

DEMO = Path(__file__).resolve().parent.parent / "demo"
STARTUP_SECONDS = 600.0
NAME = "overheads"
PROMPTS = ("Return a new array of", "This module provides a", "Raise an exception if the")
WARM_UP = 2
"""Pairs of loads that are not counted."""
VLLM = ("vllm.entrypoints.openai.api_server", "--model")


@dataclass(frozen=True)
class Overhead:
    """One comparison.

    Attributes:
        what: the question.
        unit: seconds, us/token (less is better) or tokens/s (more is better).
        one, other: medians of the two sides.
        ratios: other / one, pair by pair.
        median, low, high: of the ratios, with their quartiles.
    """

    what: str
    unit: str
    one: float
    other: float
    ratios: tuple[float, ...]
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, what: str, unit: str, one: Sequence[float], other: Sequence[float]) -> Overhead:
        """From at least two pairs."""
        ratio = Ratio.of(one, other)
        return cls(
            what,
            unit,
            statistics.median(one),
            statistics.median(other),
            tuple(round(pair, 4) for pair in ratio.pairs),
            ratio.median,
            ratio.low,
            ratio.high,
        )


def startup(base: Path, eigen: Path, logs: Path, pairs: int, reporter: Reporter) -> Overhead:
    """Seconds from the command to an answer of `/health`, by turns; the first pair is not counted.

    That pair fills the caches: torch's compiled graphs of either model, our compiled kernels.
    """

    def seconds(side: int) -> float:
        began = time.monotonic()
        with start((base, eigen)[side], *_options(), log=logs / "startup.log") as server:
            server.wait_ready(STARTUP_SECONDS)
            return time.monotonic() - began

    reporter.stage("start-up", 2 * (pairs + 1))
    one, other = by_turns(seconds, pairs, 1, reporter.step)
    return Overhead.of("start-up, Eigen against base", "s", one, other)


def decode(
    what: str, one: ServerProcess, other: ServerProcess, args: argparse.Namespace, report: Reporter
) -> tuple[Overhead, Overhead]:
    """Output tokens a second of two running servers, by turns, and their API's CPU time a token.

    Throughput varies from load to load by more than small overheads on a shared machine; the CPU
    time of the process that has them bounds what they can take from it.
    """
    from openai import OpenAI

    servers = (one, other)
    sides = [
        OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300.0) for server in servers
    ]
    spent: tuple[list[float], list[float]] = ([], [])

    def speed(side: int) -> float:
        before = cpu_seconds(servers[side].process.pid)
        found = tokens_per_second(sides[side], NAME, PROMPTS, users=args.users, tokens=args.tokens)
        seconds = cpu_seconds(servers[side].process.pid) - before
        spent[side].append(1e6 * seconds / (args.users * args.tokens))
        return found

    report.stage(what, 2 * (args.pairs + WARM_UP))
    speeds = by_turns(speed, args.pairs, WARM_UP, report.step)
    return (
        Overhead.of(what, "tokens/s", *speeds),
        Overhead.of(f"{what}: CPU time of the API", "us/token", *(s[WARM_UP:] for s in spent)),
    )


@contextlib.contextmanager
def watched(server: ServerProcess) -> Iterator[None]:
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


def measure(args: argparse.Namespace, work: Path, reporter: Reporter) -> Iterator[Overhead]:
    """One row after the other."""
    base = args.base
    folded, bases = (
        _calibrated(args, work / name, *options, reporter=reporter)
        for name, options in (("folded", ()), ("bases", ("--bases-only",)))
    )
    if args.starts:
        yield startup(base, folded, work, args.starts, reporter)
    if not args.pairs:
        return
    own = {"VLLM_PLUGINS": "eigen"}  # the models without our routes
    with (
        start(folded, *_options(), log=work / "1.log", environment=own, program=VLLM) as one,
        start(folded, *_options(), log=work / "2.log") as other,
    ):
        one.wait_ready(STARTUP_SECONDS)
        other.wait_ready(STARTUP_SECONDS)
        with watched(other):
            what = "decode, routes and statistics against vLLM's server alone"
            yield from decode(what, one, other, args, reporter)
    with (
        start(folded, *_options(), log=work / "3.log") as one,
        start(base, *_options(), "--eigen-bases", str(bases), log=work / "4.log") as other,
    ):
        one.wait_ready(STARTUP_SECONDS)
        other.wait_ready(STARTUP_SECONDS)
        yield decode("decode, bases only against folded", one, other, args, reporter)[0]


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table."""
    lines = [
        "# What the parts cost that are not attention",
        "",
        "Ratios of the second to the first, pair by pair: median and quartiles. Made by `python -m "
        "benchmarks.overheads`; commands, versions and machines are in the JSON beside it.",
        "",
        "| what | first | second | ratio | pairs |",
        "|---|---|---|---|---|",
    ]
    lines += [
        "| {what} | {one:,.4g} {unit} | {other:,.4g} {unit} "
        "| {median:.3f} ({low:.3f} to {high:.3f}) | {pairs} |".format(
            **row, pairs=len(row["ratios"])
        )
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overheads", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--base", type=Path, default=DEMO / "model", metavar="DIR")
    parser.add_argument("--text", type=Path, metavar="FILE", help="calibration text")
    parser.add_argument("--kv-ratio", type=float, default=0.6)
    parser.add_argument("--starts", type=int, default=5, help="pairs of starts (%(default)s)")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of loads (%(default)s)")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="output tokens of each user")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args(argv)
    if not all(count == 0 or count > 1 for count in (args.starts, args.pairs)):
        parser.error("--starts and --pairs must be at least 2, or 0 to leave them out")
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false")
    made = provenance.collect(sys.argv if argv is None else argv)
    rows = stored(args.output)
    status = 0
    with TemporaryDirectory() as work, terminate_as_interrupt(), Reporter() as reporter:
        try:
            for row in measure(args, Path(work), reporter):
                rows[row.what] = asdict(row) | {"provenance": made}
                save(args.output, rows)
                reporter.note(f"{row.what}: {row.median:.3f} ({row.low:.3f} to {row.high:.3f})")
        except EigenError as error:
            reporter.note(f"benchmarks.overheads: {error}")
            status = error.exit_code
    print(markdown(rows.values()))
    return status


def stored(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of earlier runs by `what`; a new run replaces those it measures.

    Raises:
        SystemExit: the file is no such table.
    """
    if not path.exists():
        return {}
    try:
        return {row["what"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"benchmarks.overheads: {path} is no result of this command") from error


def save(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the JSON, and the table beside it."""
    with atomic_file(path) as work:
        work.write_text(json.dumps({"rows": list(rows.values())}, indent=1) + "\n", "utf-8")
    with atomic_file(path.with_suffix(".md")) as work:
        work.write_text(markdown(rows.values()), encoding="utf-8")


def _calibrated(args: argparse.Namespace, folder: Path, *options: str, reporter: Reporter) -> Path:
    text = args.text
    if text is None:
        from demo import corpus

        text = folder.with_suffix(".txt")
        corpus.write("calibration", text, max_bytes=200_000)
    reporter.note(f"calibrating {folder.name} ...")
    arguments = ["calibrate", str(args.base), "--output", str(folder), "--text", str(text)]
    arguments += ["--kv-ratio", str(args.kv_ratio), "--samples", "32"]
    arguments += ["--seq-len", "512", "--quiet"]
    if cli.main([*arguments, *options]):
        raise EngineError("calibration failed, see above")
    return folder


def _options() -> list[str]:
    return ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", NAME]


if __name__ == "__main__":
    raise SystemExit(main())
