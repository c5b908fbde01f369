# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen calibrate`: make an Eigen checkpoint of a model."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.calibration.commands.push import add_hub_arguments
from vllm_eigen.calibration.methods import DEFAULT, METHODS
from vllm_eigen.calibration.preference import Preference
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.common.errors import UsageError
from vllm_eigen.common.packages import check_torchvision

if TYPE_CHECKING:
    from vllm_eigen.calibration.model.text import Corpus
    from vllm_eigen.calibration.predict import Prediction
    from vllm_eigen.checkpoint.config import EigenConfig

DEVICE_HELP = "to compute on (default: a GPU if there is one)"
_UNRECORDED_WITH_VALUE = ("--output", "--push", "--license")
_UNRECORDED = (*_UNRECORDED_WITH_VALUE, "--overwrite", "--resume", "--quiet", "--private")
HELP = "compress a model's KV cache: calibrate, fold, write a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file, or Hugging Face hub id")
    parser.add_argument("--revision", metavar="R", help="of a hub model: branch, tag or commit")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--kv-ratio", type=float, metavar="R", help="KV bytes relative to the base, e.g. 0.27"
    )
    size.add_argument(
        "--kv-bits", type=float, metavar="B", help="the same in bits a cached number, e.g. 4.25"
    )
    size.add_argument(
        "--error-budget", type=float, metavar="E", help="relative error allowed a layer, e.g. 0.05"
    )
    size.add_argument(
        "--ranks", type=Path, metavar="FILE", help="JSON list of [rank_k, rank_v] per layer"
    )
    parser.add_argument(
        "--rank-multiple",
        type=int,
        metavar="N",
        help="16-bit ranks are multiples of it (default 8, with heads below 64: 1; for fp8: 16)",
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
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--prefer",
        choices=tuple(Preference),
        type=Preference,
        default=Preference.MEMORY,
        help="memory: keys before RoPE, least loss; speed: after it (default %(default)s)",
    )
    keys.add_argument(
        "--key-cache", choices=tuple(KeyMode), type=KeyMode, help="the same by the mode's name"
    )
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
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help=DEVICE_HELP
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument(
        "--dry-run", action="store_true", help="only predict size, memory, disk and time"
    )
    parser.add_argument("--push", metavar="REPO", help="publish it on the hub as OWNER/NAME")
    add_hub_arguments(parser)
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
    from vllm_eigen.calibration.model.text import read_dataset, read_files

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

    Not in it: the time, where the output goes, and whether an interrupted run was continued.
    """
    from vllm_eigen.common.provenance import collect

    kept: list[str] = []
    skip = False
    for item in arguments:
        name, _, value = item.partition("=")
        if not skip and name not in _UNRECORDED:
            kept.append(item)
        skip = name in _UNRECORDED_WITH_VALUE and not value
    record = collect(["vllm-eigen", *kept])
    del record["date"]
    return record


def _print_prediction(found: Prediction) -> None:
    def number(value: float | None, form: str) -> str:
        return "as the error budget decides" if value is None else form.format(value)

    if found.kept_layers:
        whole = found.layers + found.kept_layers
        print(f"compressed      {found.layers} of {whole} layers; numbers are theirs")
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


def _choice(eigen: EigenConfig) -> str:
    """What the bytes were spent on."""
    size, layers = eigen.head_size, eigen.layers
    bits = [
        statistics.fmean(
            16 * rank / size if code is None else 8 * code.num_bytes / size for rank, code in part
        )
        for part in (
            [(layer.rank_k, layer.key_code) for layer in layers],
            [(layer.rank_v, layer.value_code) for layer in layers],
        )
    ]
    return f"keys {eigen.key_mode} {bits[0]:.2f}, values {bits[1]:.2f} bits a number"


def run(args: argparse.Namespace) -> int:
    """Calibrate; prints one line about the result."""
    check_torchvision()
    from vllm_eigen.calibration.export.push import Destination, destination, push
    from vllm_eigen.calibration.options import Options
    from vllm_eigen.calibration.pipeline import calibrate
    from vllm_eigen.calibration.predict import predict
    from vllm_eigen.calibration.target import Target
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    reporter = Reporter(quiet=args.quiet)
    options = Options(
        model=args.model,
        output=args.output,
        corpus=corpus_of(args),
        provenance=_record(sys.argv[1:]),
        target=Target.of(
            args.kv_ratio, args.kv_bits, args.error_budget, args.ranks, args.rank_multiple
        ),
        samples=args.samples,
        length=args.seq_len,
        seed=args.seed,
        method=args.method,
        key_mode=args.key_cache,
        prefer=args.prefer,
        head_group=args.head_group,
        refit=args.refit,
        revision=args.revision,
        bases_only=args.bases_only,
        device=args.device,
        overwrite=args.overwrite,
        resume=args.resume,
    )
    if args.dry_run:
        _print_prediction(predict(options))
        return 0
    to: Destination | None = None
    if args.push is not None:
        to = destination(
            args.push,
            base=args.model,
            commit=args.revision,
            licence=args.license,
            private=args.private,
        )
    elif args.license or args.private:
        raise UsageError("--license and --private are for --push REPO")
    with terminate_as_interrupt(), reporter:
        eigen = calibrate(options, reporter)
        address = None if to is None else push(options.output, to)
    if not args.quiet:
        print(
            f"{args.output}: KV ratio {eigen.kv_ratio:.4f}, {eigen.bytes_per_token(2)} cached "
            f"bytes a token instead of {eigen.uncompressed_bytes_per_token(2)} at 16 bits; "
            f"{_choice(eigen)}",
            file=sys.stderr,
        )
        if address is not None:
            print(address)
    return 0
