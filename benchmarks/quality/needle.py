# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench needle`: does a model with a compressed cache still find facts in long texts?

Base and checkpoints are served by vLLM in turn. Every text enters the prefix cache once, so all its
questions read keys and values from the cache. An answer counts if it begins with the digits asked
for; differences from the base are paired by question.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.benchmarks.lib.arguments import positive

if TYPE_CHECKING:
    from vllm_eigen.benchmarks.quality.haystack import Haystack
    from vllm_eigen.common.progress import Reporter

HELP = "retrieval of facts hidden in long texts, as served"
AT_ONCE = 8
"""Questions sent at once."""
POOL_BYTES = 512 << 20
"""KV pool of each server: room for one text and its questions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--base", required=True, metavar="MODEL", help="uncompressed model")
    parser.add_argument(
        "--eigen", nargs="+", required=True, type=Path, metavar="DIR", help="its checkpoints"
    )
    parser.add_argument(
        "--text", required=True, type=Path, metavar="FILE", help="what the facts are hidden in"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=positive, default=[4096], metavar="L", help="tokens (4096)"
    )
    parser.add_argument("--haystacks", type=positive, default=8, metavar="N", help="a length (8)")
    parser.add_argument("--keys", type=positive, default=16, metavar="N", help="facts each (16)")
    parser.add_argument("--seed", type=int, default=0, help="of names and numbers (0)")
    parser.add_argument("--dtype", default="auto", help="of the servers (auto)")
    parser.add_argument(
        "--base-cache-dtypes", nargs="+", default=["auto"], metavar="T", help="e.g. auto fp8"
    )
    parser.add_argument("--output-json", required=True, type=Path, metavar="FILE", help="result")


def run(args: argparse.Namespace) -> int:
    """Measure, write, print.

    Raises:
        UsageError, InputError: before anything starts.
        EngineError: a server fails.
    """
    from rich.console import Console
    from rich.table import Table

    from vllm_eigen.benchmarks.lib.results import collect_provenance, write_json
    from vllm_eigen.benchmarks.lib.servers import set_environment
    from vllm_eigen.benchmarks.quality.haystack import NAMES, haystacks
    from vllm_eigen.calibration.model.source import open_source
    from vllm_eigen.common.errors import InputError, UsageError
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt
    from vllm_eigen.plugin.vllm_version import check_vllm_version

    check_vllm_version()
    if args.keys > len(NAMES):
        raise UsageError(f"--keys {args.keys} is out of range; it is at most {len(NAMES)}")
    names = [path.name for path in args.eigen]
    if len(set(names)) < len(names):
        raise UsageError("--eigen: two checkpoints have the same folder name; rename one")
    source = open_source(args.base)
    if max(args.lengths) >= source.max_positions:
        raise UsageError(f"--lengths: {args.base} takes at most {source.max_positions} tokens")
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {args.text} cannot be read: {error}") from error
    texts = {
        length: haystacks(
            source.tokenizer(),
            text,
            length=length,
            keys=args.keys,
            number=args.haystacks,
            seed=args.seed + length,
        )
        for length in args.lengths
    }
    set_environment(args.base, *args.eigen)
    with terminate_as_interrupt(), Reporter() as reporter:
        answers = {
            label: _serve(model, cache, label, texts, args, reporter)
            for label, model, cache in _sides(args)
        }
    rows = _rows(answers)
    write_json(args.output_json, {"rows": rows, "provenance": collect_provenance()})
    table = Table(title=f"facts found in texts of {args.keys} facts")
    for heading in ("cache", "tokens", "KV ratio", "found, %", "less base, points"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in rows:
        table.add_row(
            row["label"],
            f"{row['length']:,}",
            f"{row['kv_ratio']:.4f}",
            f"{row['found']:.1f} ± {row['found_error']:.1f}",
            f"{row['change']:+.1f} ± {row['change_error']:.1f}",
        )
    Console().print(table)
    print("± is two standard errors; the change is paired by question.")
    return 0


def _sides(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Label, model and cache type of every server; the first is what others are compared with."""
    base = [(f"base {cache}", args.base, cache) for cache in args.base_cache_dtypes]
    return base + [(path.name, str(path), "auto") for path in args.eigen]


def _serve(
    model: str,
    cache: str,
    label: str,
    texts: dict[int, list[Haystack]],
    args: argparse.Namespace,
    reporter: Reporter,
) -> tuple[float, dict[int, list[bool]]]:
    """The KV ratio of one server, and by length which questions it answered."""
    from vllm_eigen.benchmarks.lib.endpoint import Endpoint
    from vllm_eigen.benchmarks.lib.servers import running

    longest = max(texts) + 16
    log = args.output_json.with_name(f"{args.output_json.stem}-{label.replace(' ', '-')}.log")
    options = ["--dtype", args.dtype, "--kv-cache-dtype", cache]
    options += ["--max-model-len", str(longest), "--kv-cache-memory-bytes", str(POOL_BYTES)]
    with running(model, *options, log=log) as server:
        endpoint = Endpoint(server.url)
        ratio = float(endpoint.kv_cache().get("kv_ratio") or 1.0)
        found: dict[int, list[bool]] = {}
        for length, many in texts.items():
            reporter.stage(f"{label}, {length:,} tokens", len(many))
            found[length] = []
            for haystack in many:
                found[length] += ask(endpoint.openai(), endpoint.model(), haystack)
                reporter.step()
    log.unlink()
    return ratio, found


def ask(client: Any, model: str, haystack: Haystack) -> list[bool]:
    """Whether the greedy answer to each question begins with its digits.

    Args:
        client: an `openai` client.
    """
    from concurrent.futures import ThreadPoolExecutor

    def answer(index: int) -> bool:
        made = client.completions.create(
            model=model,
            prompt=[*haystack.tokens, *haystack.questions[index]],
            max_tokens=12,
            temperature=0,
        )
        text: str = made.choices[0].text
        return text.strip().startswith(haystack.answers[index])

    # The first question fills the prefix cache for the others.
    first = answer(0)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [first, *pool.map(answer, range(1, len(haystack.questions)))]


def _rows(answers: dict[str, tuple[float, dict[int, list[bool]]]]) -> list[dict[str, Any]]:
    """One row a server and length; the first server is the one compared with."""
    _, base = next(iter(answers.values()))
    rows = []
    for label, (ratio, found) in answers.items():
        for length, right in found.items():
            change = [int(a) - int(b) for a, b in zip(right, base[length], strict=True)]
            rows.append(
                {
                    "label": label,
                    "length": length,
                    "kv_ratio": ratio,
                    "questions": len(right),
                    "found": _percent(right)[0],
                    "found_error": _percent(right)[1],
                    "change": _percent(change)[0],
                    "change_error": _percent(change)[1],
                }
            )
    return rows


def _percent(values: Sequence[int]) -> tuple[float, float]:
    """Mean and two standard errors, in percent; the error of one value is not known."""
    from statistics import fmean, stdev

    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return 100 * fmean(values), 200 * error
