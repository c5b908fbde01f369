"""`vllm-eigen bench serve`: on the same KV memory, how much more traffic, and what is lost?

Starts base and Eigen in turn on the same `--kv-cache-memory-bytes`, drives each with vLLM's own
benchmark client, samples the KV cache beside it, and writes tables and plots to a folder. The parts
are in `benchmarks.serving`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.errors import UsageError

if TYPE_CHECKING:
    from benchmarks.serving.rows import Results
    from benchmarks.serving.settings import Settings

HELP = "traffic served and quality kept by base and Eigen on the same KV memory"
USUAL: dict[str, Any] = {
    "kv_ratio": 0.6,
    "dataset": "random",
    "input_len": 256,
    "output_len": 256,
    "num_prompts": 200,
    "warmups": 8,
    "repeats": 3,
    "kv_cache_dtype": "auto",
    "output": Path("bench-serve"),
}
QUICK: dict[str, Any] = {
    "kv_cache_memory_bytes": "2MiB",
    "max_model_len": 512,
    "input_len": 64,
    "output_len": 192,
    "num_prompts": 80,
    "max_concurrency": "24",
}
"""For the shipped model on two cores: the base's pool holds three to four sequences of 256 tokens,
and 24 users ask for one. Few sequences, as long contexts leave of a GPU's pool, and the range in
which another sequence costs a CPU's step little."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; defaults are filled in by `run`, for a preset changes them."""
    parser.add_argument("--base", metavar="MODEL", help="uncompressed model, folder or hub id")
    parser.add_argument("--eigen", metavar="DIR", help="its Eigen checkpoint")
    parser.add_argument(
        "--base-url", metavar="URL", help="a running server instead of starting one"
    )
    parser.add_argument("--eigen-url", metavar="URL", help="the same for Eigen")
    parser.add_argument("--preset", choices=("quick",), help="quick: shipped model, minutes")
    parser.add_argument("--kv-ratio", type=float, metavar="R", help="of the preset's Eigen (0.6)")
    pool = parser.add_argument_group("the servers, the same for both")
    pool.add_argument("--kv-cache-memory-bytes", metavar="SIZE", help="KV pool, e.g. 64MiB")
    pool.add_argument("--kv-cache-dtype", metavar="LIST", help="e.g. auto,fp8 (auto)")
    pool.add_argument("--max-model-len", type=_positive, metavar="N")
    pool.add_argument("--max-num-seqs", type=_positive, metavar="N")
    pool.add_argument("server_options", nargs="*", metavar="-- VLLM_FLAGS", help="further flags")
    load = parser.add_argument_group("the load")
    load.add_argument("--dataset", choices=("random", "sharegpt", "custom"), help="(random)")
    load.add_argument("--dataset-path", metavar="FILE", help="of sharegpt or custom (jsonl)")
    load.add_argument("--input-len", type=_positive, metavar="N", help="tokens, random (256)")
    load.add_argument("--output-len", type=_count, metavar="N", help="0: the data set's own (256)")
    load.add_argument("--num-prompts", type=_positive, metavar="N", help="requests a run (200)")
    load.add_argument("--max-concurrency", metavar="LIST", help="concurrency sweep, e.g. 8,32")
    load.add_argument("--request-rate", metavar="LIST", help="rate sweep, e.g. 2,8,inf")
    load.add_argument("--warmups", type=_count, metavar="N", help="uncounted requests first (8)")
    load.add_argument("--repeats", type=_positive, metavar="N", help="of every pair (3)")
    load.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", metavar="MODEL", help="(the base)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="held out, for perplexity")
    parser.add_argument("--output", type=Path, metavar="DIR", help="kept and resumed (bench-serve)")
    parser.add_argument("--overwrite", action="store_true", help="measure everything anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all results in one file")


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; 1 if any request failed.

    Raises:
        UsageError, InputError: before anything starts.
        EngineError: a server or the client failed; finished rows are kept.
    """
    from benchmarks.serving.rows import load_results
    from benchmarks.serving.visits import Bench
    from calibration.interrupt import terminate_as_interrupt
    from calibration.progress import Reporter
    from vllm_eigen import provenance
    from vllm_eigen.vllm_version import check_vllm_version

    check_vllm_version()
    for package in ("matplotlib", "pandas"):
        if find_spec(package) is None:
            raise UsageError(f"{package} is missing; install the project with its [bench] extra")
    for name, value in (USUAL | (QUICK if args.preset else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    with terminate_as_interrupt():
        if args.preset:
            prepare_demo(args)
        settings = settings_of(args)
        if all(Path(side.model).is_dir() for side in settings.sides):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else every load asks the hub first
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        results = load_results(args.output, settings, overwrite=args.overwrite)
        results.runs.append(provenance.collect())
        args.output.mkdir(parents=True, exist_ok=True)
        with Reporter() as reporter:
            Bench(settings, results, args.output, reporter).run()
    return finish(results, args.output, args.json)


def finish(results: Results, folder: Path, json_file: Path | None) -> int:
    """Write tables and plots, print the table; returns the exit status."""
    from rich.console import Console
    from rich.table import Table

    from benchmarks.serving.plots import plot
    from benchmarks.serving.table import SHOWN, cells, groups, markdown, summary
    from vllm_eigen.files import atomic_file

    results.save(folder)
    with atomic_file(folder / "results.md") as work:
        work.write_text(markdown(results), encoding="utf-8")
    plots = plot(folder, results)
    if json_file is not None:
        document = {"summary": summary(results), **results.model_dump(mode="json")}
        with atomic_file(json_file) as work:
            work.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console = Console()
    for dtype, load in groups(results):
        table = Table(title=f"{load}, cache {dtype}; median (range) of the repeats")
        for heading in ("", "base", "Eigen", "Eigen / base"):
            table.add_column(heading, justify="right" if heading else "left")
        for line in cells(results, dtype, load, SHOWN):
            table.add_row(*line)
        console.print(table)
    names = ["results.md", "results.json", "results.csv", *(path.name for path in plots)]
    console.print(f"{folder}: {', '.join(names)}", soft_wrap=True, markup=False, highlight=False)
    failed = sum(row.failed for row in results.rows)
    if failed:
        console.print(f"[red]{failed} requests failed[/]; results.md says why")
    return int(failed > 0)


def settings_of(args: argparse.Namespace) -> Settings:
    """Checked settings of the command line.

    Raises:
        UsageError: options are missing or contradict each other.
        InputError: a file cannot be read.
    """
    from benchmarks.serving.settings import (
        Settings,
        Side,
        Workload,
        parse_cache_dtypes,
        parse_loads,
    )
    from server.units import parse_size

    if args.base is None:
        raise UsageError("name the uncompressed model with --base, or pass --preset quick")
    running = args.base_url is not None
    if running != (args.eigen_url is not None):
        raise UsageError("give both --base-url and --eigen-url, or neither")
    dtypes = parse_cache_dtypes(args.kv_cache_dtype)
    fixed = (args.kv_cache_memory_bytes, args.max_model_len, args.max_num_seqs)
    if running and (any(fixed) or args.server_options or len(dtypes) > 1):
        raise UsageError("servers that run already keep their flags; drop those meant for new ones")
    if not running and args.eigen is None:
        raise UsageError("name the compressed checkpoint with --eigen")
    if not running and args.kv_cache_memory_bytes is None:
        raise UsageError("give both servers a pool: --kv-cache-memory-bytes SIZE, e.g. 64MiB")
    if (args.dataset == "random") != (args.dataset_path is None):
        raise UsageError("--dataset-path goes with --dataset sharegpt or custom, and they need it")
    if args.dataset == "random" and args.output_len == 0:
        raise UsageError("random requests have no output length of their own; give --output-len")
    for path in (args.dataset_path, args.text):
        if path is not None and not Path(path).is_file():
            raise UsageError(f"{path} is no file")
    return Settings(
        sides=(
            Side("base", args.base, args.base_url),
            Side("eigen", args.eigen or "", args.eigen_url),
        ),
        workload=Workload(
            dataset=args.dataset,
            dataset_path=args.dataset_path,
            input_len=args.input_len,
            output_len=args.output_len,
            num_prompts=args.num_prompts,
            warmups=args.warmups,
            seed=args.seed,
        ),
        loads=parse_loads(args.request_rate, args.max_concurrency),
        repeats=args.repeats,
        cache_dtypes=dtypes,
        pool_bytes=None if running else parse_size(args.kv_cache_memory_bytes),
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        server_options=tuple(args.server_options),
        tokenizer=args.tokenizer or args.base,
        text=args.text,
    )


def prepare_demo(args: argparse.Namespace) -> None:
    """For the preset: the shipped model, a checkpoint made of it, and held-out text.

    Raises:
        UsageError: the repository's `demo/` is not here.
    """
    clone = Path(__file__).resolve().parent.parent
    if not (clone / "demo" / "model").is_dir():
        raise UsageError(
            "the preset needs demo/ of the repository: install from a clone with pip install -e, "
            "or name --base and --eigen without --preset"
        )
    sys.path.append(str(clone))  # demo/ is not part of the installed packages
    from demo import corpus, run

    if args.base is None:
        args.base = str(run.ROOT / "model")
        args.text = args.text or args.output / "heldout.txt"
        if not args.text.is_file():
            corpus.write("heldout", args.text, max_bytes=400_000)
        if args.eigen is None:
            folder = args.output / f"eigen-{args.kv_ratio:g}"
            made = (folder / "config.json").is_file()
            args.eigen = str(folder if made else run.calibrate(args.kv_ratio, folder))


def _positive(text: str) -> int:
    value = _count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be above zero")
    return value


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of zero or more")
    return value
