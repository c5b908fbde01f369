"""`vllm-eigen calibrate`: make an Eigen checkpoint of a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.methods import DEFAULT, METHODS
from vllm_eigen.errors import UsageError

if TYPE_CHECKING:
    from calibration.predict import Prediction
    from calibration.text import Corpus

HELP = "compress a model's KV cache: calibrate, fold, write a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hugging Face hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--kv-ratio", type=float, metavar="R", help="KV bytes relative to the base, e.g. 0.6"
    )
    size.add_argument(
        "--error-budget", type=float, metavar="E", help="relative error allowed a layer, e.g. 0.05"
    )
    size.add_argument(
        "--ranks", type=Path, metavar="FILE", help="JSON list of [rank_k, rank_v] per layer"
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--samples", type=int, default=128, metavar="N", help="windows (default %(default)s)"
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        default=2048,
        metavar="L",
        help="tokens a window, at most the model's (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        default=DEFAULT,
        help="how the bases are chosen (default %(default)s)",
    )
    parser.add_argument("--head-group", type=int, metavar="G", help="KV heads sharing a latent")
    parser.add_argument("--key-cache", choices=("folded", "pre-rope", "post-rope"))
    parser.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        help="fit output projections to the compressed heads (default: where the method does)",
    )
    parser.add_argument(
        "--bases-only",
        action="store_true",
        help="write the bases alone, for `serve BASE --eigen-bases DIR`",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--resume", action="store_true", help="take up an interrupted run")
    parser.add_argument(
        "--dry-run", action="store_true", help="only predict size, memory, disk and time"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, no summary")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the text comes from; shared by the commands that read text."""
    parser.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="UTF-8, <|endoftext|> between texts"
    )
    parser.add_argument("--dataset", metavar="NAME", help="Hugging Face data set (wikitext)")
    parser.add_argument("--dataset-config", metavar="C", help="e.g. wikitext-2-raw-v1")
    parser.add_argument("--split", metavar="S", help="of the data set (train)")


def corpus_of(args: argparse.Namespace, default_split: str = "train") -> Callable[[], Corpus]:
    """A function that reads the text that the arguments name.

    Raises:
        UsageError: files and a data set are named together.
    """
    from calibration.text import read_dataset, read_files

    if args.text:
        if args.dataset or args.dataset_config or args.split:
            raise UsageError("pass either --text or --dataset, not both")
        return partial(read_files, args.text)
    name, config = args.dataset or "wikitext", args.dataset_config
    if name == "wikitext":
        # The hub knows WikiText by its owner's name only.
        name, config = "Salesforce/wikitext", config or "wikitext-2-raw-v1"
    return partial(read_dataset, name, config, args.split or default_split)


def _record(arguments: Sequence[str]) -> dict[str, Any]:
    """Provenance that is the same for every run that must give the same bytes.

    Not in it: the time, where the result goes, and whether an interrupted run was taken up.
    """
    from vllm_eigen.provenance import collect

    kept: list[str] = []
    skip = False
    for item in arguments:
        name, _, value = item.partition("=")
        if not skip and name not in ("--output", "--overwrite", "--resume", "--quiet"):
            kept.append(item)
        skip = name == "--output" and not value
    record = collect(["vllm-eigen", *kept])
    del record["date"]
    return record


def _print_prediction(found: Prediction) -> None:
    def number(value: float | None, form: str) -> str:
        return "as the error budget decides" if value is None else form.format(value)

    print(f"KV ratio        {number(found.kv_ratio, '{:.4f}')}")
    print(f"bytes a token   {number(found.bytes_per_token, '{:,}')}", end="")
    print(f" of {found.uncompressed_bytes_per_token:,}")
    print(f"tokens per GiB  {number(found.tokens_per_gib, '{:,}')}")
    print(f"peak memory     {found.peak_memory_bytes / 2**30:.2f} GiB")
    print(f"disk            {found.disk_bytes / 2**30:.2f} GiB")
    print(f"time            about {_duration(found.seconds)}")


def _duration(seconds: float) -> str:
    """In the unit a person would choose."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def run(args: argparse.Namespace) -> int:
    """Calibrate; prints one line about the result."""
    from calibration.interrupt import terminate_as_interrupt
    from calibration.options import Options
    from calibration.pipeline import calibrate, foresee
    from calibration.progress import Reporter

    reporter = Reporter(quiet=args.quiet)
    options = Options(
        model=args.model,
        output=args.output,
        corpus=corpus_of(args),
        provenance=_record(sys.argv[1:]),
        kv_ratio=args.kv_ratio,
        error_budget=args.error_budget,
        ranks=args.ranks,
        samples=args.samples,
        length=args.seq_len,
        seed=args.seed,
        method=args.method,
        key_mode=args.key_cache,
        head_group=args.head_group,
        refit=args.refit,
        bases_only=args.bases_only,
        device=args.device,
        overwrite=args.overwrite,
        resume=args.resume,
    )
    if args.dry_run:
        _print_prediction(foresee(options))
        return 0
    with terminate_as_interrupt(), reporter:
        eigen = calibrate(options, reporter)
    if not args.quiet:
        print(
            f"{args.output}: KV ratio {eigen.kv_ratio:.4f}, {eigen.elements_per_token} cached "
            f"elements a token instead of {eigen.uncompressed_elements_per_token}",
            file=sys.stderr,
        )
    return 0
