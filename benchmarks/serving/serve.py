# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench serve`: on the same KV memory, how much more traffic, and what is lost?

Starts base and Eigen in turn on the same `--kv-cache-memory-bytes`, drives each with vLLM's own
benchmark client, samples the KV cache beside it, and writes tables and plots to a folder. The parts
are in `vllm_eigen.benchmarks.serving`.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.benchmarks.lib.arguments import add_from, count, positive
from vllm_eigen.common.errors import UsageError

if TYPE_CHECKING:
    from vllm_eigen.benchmarks.serving.rows import Results
    from vllm_eigen.benchmarks.serving.settings import Settings

HELP = "traffic served and quality kept by base and Eigen on the same KV memory"
USUAL: dict[str, Any] = {
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
    "kv_cache_memory_bytes": "20MiB",
    "max_model_len": 512,
    "input_len": 64,
    "output_len": 192,
    "num_prompts": 80,
    "max_concurrency": "24",
}
"""For the demo model on two cores: the base's pool holds three sequences of 256 tokens, and 24
users ask for one. Few sequences, as long contexts leave of a GPU's pool, and the range in
which another sequence costs a CPU's step little."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; defaults are filled in by `run`, for a preset changes them."""
    parser.add_argument("--base", metavar="MODEL", help="uncompressed model, folder or hub id")
    parser.add_argument("--eigen", metavar="DIR", help="its Eigen checkpoint")
    parser.add_argument(
        "--base-url", metavar="URL", help="a running server instead of starting one"
    )
    parser.add_argument("--eigen-url", metavar="URL", help="the same for Eigen")
    parser.add_argument(
        "--preset", choices=("quick",), help="sizes for a small model on two cores, minutes"
    )
    pool = parser.add_argument_group("the servers, the same for both")
    pool.add_argument("--kv-cache-memory-bytes", metavar="SIZE", help="KV pool, e.g. 64MiB")
    pool.add_argument("--kv-cache-dtype", metavar="LIST", help="e.g. auto,fp8 (auto)")
    pool.add_argument(
        "--base-kv-cache-dtype", metavar="TYPE", help="the base's own, e.g. fp8 against coded pages"
    )
    pool.add_argument(
        "--max-model-len", type=positive, metavar="N", help="longest sequence, tokens"
    )
    pool.add_argument(
        "--max-num-seqs", type=positive, metavar="N", help="sequences in a batch at most"
    )
    pool.add_argument("server_options", nargs="*", metavar="-- VLLM_FLAGS", help="further flags")
    load = parser.add_argument_group("the load")
    load.add_argument("--dataset", choices=("random", "sharegpt", "custom"), help="(random)")
    load.add_argument("--dataset-path", metavar="FILE", help="of sharegpt or custom (jsonl)")
    load.add_argument("--input-len", type=positive, metavar="N", help="tokens, random (256)")
    load.add_argument("--output-len", type=count, metavar="N", help="0: the data set's own (256)")
    load.add_argument("--num-prompts", type=positive, metavar="N", help="requests a run (200)")
    load.add_argument("--max-concurrency", metavar="LIST", help="concurrency sweep, e.g. 8,32")
    load.add_argument("--request-rate", metavar="LIST", help="rate sweep, e.g. 2,8,inf")
    load.add_argument("--warmups", type=count, metavar="N", help="uncounted requests first (8)")
    load.add_argument("--repeats", type=positive, metavar="N", help="of every pair (3)")
    load.add_argument("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    parser.add_argument("--tokenizer", metavar="MODEL", help="(the base)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="held out, for perplexity")
    parser.add_argument("--output", type=Path, metavar="DIR", help="kept and resumed (bench-serve)")
    parser.add_argument("--overwrite", action="store_true", help="measure everything anew")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="all results in one file")
    add_from(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; 1 if any request failed.

    Raises:
        UsageError, InputError: before anything starts.
        EngineError: a server or the client failed; finished rows are kept.
    """
    from vllm_eigen.benchmarks.lib.results import collect_provenance
    from vllm_eigen.benchmarks.lib.servers import set_environment
    from vllm_eigen.benchmarks.serving.rows import load_results, read_results
    from vllm_eigen.benchmarks.serving.runner import Runner
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt
    from vllm_eigen.plugin.vllm_version import check_vllm_version

    if args.earlier is not None:
        results = read_results(args.earlier)
        write_tables(results, args.earlier)
        return show(results)
    check_vllm_version()
    for package in ("matplotlib", "pandas"):
        if find_spec(package) is None:
            raise UsageError(f"{package} is missing; install the project with its [bench] extra")
    for name, value in (USUAL | (QUICK if args.preset else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    settings = settings_of(args)
    with terminate_as_interrupt(), Reporter() as reporter:
        set_environment(*(side.model for side in settings.sides))
        results = load_results(args.output, settings, overwrite=args.overwrite)
        results.runs.append(collect_provenance())
        args.output.mkdir(parents=True, exist_ok=True)
        Runner(settings, results, args.output, reporter).run()
    return finish(results, args.output, args.output_json)


def finish(results: Results, folder: Path, json_file: Path | None) -> int:
    """Write tables and plots, print the table; returns the exit status."""
    from vllm_eigen.benchmarks.lib.results import write_json
    from vllm_eigen.benchmarks.serving.plots import plot
    from vllm_eigen.benchmarks.serving.rows import FILE
    from vllm_eigen.benchmarks.serving.table import summary

    results.save(folder)
    write_tables(results, folder / FILE)
    plots = plot(folder, results)
    if json_file is not None:
        write_json(json_file, {"summary": summary(results), **results.model_dump(mode="json")})
    status = show(results)
    names = ["results.md", FILE, "results.csv", *(path.name for path in plots)]
    print(f"{folder}: {', '.join(names)}")
    return status


def write_tables(results: Results, path: Path) -> None:
    """Write Markdown and CSV beside the JSON file `path`."""
    from vllm_eigen.benchmarks.lib.results import write_text
    from vllm_eigen.benchmarks.serving.rows import write_rows
    from vllm_eigen.benchmarks.serving.table import markdown

    write_text(path.with_suffix(".md"), markdown(results))
    write_rows(path.with_suffix(".csv"), results.rows)


def show(results: Results) -> int:
    """Print the tables; returns 1 if a request failed."""
    from rich.console import Console
    from rich.table import Table

    from vllm_eigen.benchmarks.serving.table import SHOWN, cells, groups

    console = Console()
    for dtype, load in groups(results):
        table = Table(title=f"{load}, cache {dtype}; median (range) of the repeats")
        for heading in ("", "base", "Eigen", "Eigen / base"):
            table.add_column(heading, justify="right" if heading else "left")
        for line in cells(results, dtype, load, SHOWN):
            table.add_row(*line)
        console.print(table)
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
    from vllm_eigen.benchmarks.serving.settings import (
        Settings,
        Side,
        Workload,
        parse_cache_dtypes,
        parse_loads,
    )
    from vllm_eigen.common.sizes import parse_size

    if args.base is None:
        raise UsageError("name the uncompressed model with --base")
    running = args.base_url is not None
    if running != (args.eigen_url is not None):
        raise UsageError("give both --base-url and --eigen-url, or neither")
    dtypes = parse_cache_dtypes(args.kv_cache_dtype)
    fixed = (args.kv_cache_memory_bytes, args.max_model_len, args.max_num_seqs)
    own = args.base_kv_cache_dtype
    if own is not None:
        parse_cache_dtypes(own)
    if running and (any(fixed) or args.server_options or len(dtypes) > 1 or own):
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
        base_cache_dtype=own,
    )
