# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench needle`: does a model with a compressed cache still find facts in long texts?

Base and checkpoints are served by vLLM in turn. Every text enters the prefix cache once, so all its
questions read keys and values from the cache. A question's score is the share of the expected
strings that its answer contains, as in RULER; differences from the base are paired by question.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.benchmarks.lib.arguments import positive

if TYPE_CHECKING:
    from vllm_eigen.benchmarks.quality.haystack import Haystack, Question
    from vllm_eigen.common.progress import Reporter

Scores = dict[tuple[int, str], list[float]]
"""By length and task, one score a question."""
HELP = "retrieval of facts hidden in long texts, as served"
AT_ONCE = 8
"""Questions sent at once."""
ANSWER_TOKENS = 12
"""Tokens of an answer for each string expected."""
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
    parser.add_argument("--keys", type=positive, default=16, metavar="N", help="codes each (16)")
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
    from vllm_eigen.benchmarks.quality.haystack import MOST_EXPECTED, NAMES, SEVERAL, haystacks
    from vllm_eigen.calibration.model.source import open_source
    from vllm_eigen.common.errors import InputError, UsageError
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt
    from vllm_eigen.plugin.vllm_version import check_vllm_version

    check_vllm_version()
    if not SEVERAL <= args.keys <= len(NAMES):
        raise UsageError(
            f"--keys {args.keys} is out of range; it lies from {SEVERAL} to {len(NAMES)}"
        )
    names = [path.name for path in args.eigen]
    if len(set(names)) < len(names):
        raise UsageError("--eigen: two checkpoints have the same folder name; rename one")
    source = open_source(args.base)
    room = source.max_positions - ANSWER_TOKENS * MOST_EXPECTED
    if max(args.lengths) > room:
        raise UsageError(f"--lengths: {args.base} takes at most {room} tokens and an answer")
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
    if len(args.lengths) > 1:
        rows += over_lengths(rows)
    write_json(args.output_json, {"rows": rows, "provenance": collect_provenance()})
    table = Table(title="facts found in long texts")
    for heading in ("cache", "task", "tokens", "KV ratio", "found, %", "more than base"):
        left = heading in ("cache", "task")
        table.add_column(heading, justify="left" if left else "right")
    for row in rows:
        table.add_row(
            row["label"],
            row["task"],
            f"{row['length']:,}" if row["length"] else "all",
            f"{row['kv_ratio']:.4f}",
            f"{row['found']:.1f} ± {row['found_error']:.1f}",
            f"{row['change']:+.1f} ± {row['change_error']:.1f}",
        )
    Console().print(table)
    print("± is two standard errors; differences are points, paired by question.")
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
) -> tuple[float, Scores]:
    """The KV ratio of one server, and its scores."""
    from vllm_eigen.benchmarks.lib.endpoint import Endpoint
    from vllm_eigen.benchmarks.lib.servers import running
    from vllm_eigen.benchmarks.quality.haystack import MOST_EXPECTED

    longest = max(texts) + ANSWER_TOKENS * MOST_EXPECTED
    log = args.output_json.with_name(f"{args.output_json.stem}-{label.replace(' ', '-')}.log")
    options = ["--dtype", args.dtype, "--kv-cache-dtype", cache]
    options += ["--max-model-len", str(longest), "--kv-cache-memory-bytes", str(POOL_BYTES)]
    with running(model, *options, log=log) as server:
        endpoint = Endpoint(server.url)
        ratio = float(endpoint.kv_cache().get("kv_ratio") or 1.0)
        found: Scores = {}
        for length, many in texts.items():
            reporter.stage(f"{label}, {length:,} tokens", len(many))
            for haystack in many:
                scores = ask(endpoint.openai(), endpoint.model(), haystack)
                for question, score in zip(haystack.questions, scores, strict=True):
                    found.setdefault((length, question.task), []).append(score)
                reporter.step()
    log.unlink()
    return ratio, found


def ask(client: Any, model: str, haystack: Haystack) -> list[float]:
    """The share of its expected strings that the greedy answer to each question contains.

    Args:
        client: an `openai` client.
    """
    from concurrent.futures import ThreadPoolExecutor

    def answer(question: Question) -> float:
        made = client.completions.create(
            model=model,
            prompt=[*haystack.tokens, *question.tokens],
            max_tokens=ANSWER_TOKENS * len(question.expected),
            temperature=0,
            stop=["\n"],
        )
        text: str = made.choices[0].text
        return sum(item in text for item in question.expected) / len(question.expected)

    # The first question fills the prefix cache for the others.
    first = answer(haystack.questions[0])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [first, *pool.map(answer, haystack.questions[1:])]


def _rows(answers: dict[str, tuple[float, Scores]]) -> list[dict[str, Any]]:
    """One row a server, length and task; the first server is the one compared with."""
    _, base = next(iter(answers.values()))
    rows = []
    for label, (ratio, found) in answers.items():
        for (length, task), scores in found.items():
            change = [a - b for a, b in zip(scores, base[length, task], strict=True)]
            rows.append(
                {
                    "label": label,
                    "length": length,
                    "task": task,
                    "kv_ratio": ratio,
                    "questions": len(scores),
                    "found": _percent(scores)[0],
                    "found_error": _percent(scores)[1],
                    "change": _percent(change)[0],
                    "change_error": _percent(change)[1],
                }
            )
    return rows


def over_lengths(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a server and task, `length` None: the mean over lengths, with its error.

    Lengths are strata of equal weight: the variance of the mean is the sum of theirs over their
    number squared.
    """
    from math import hypot

    found = []
    for label, task in dict.fromkeys((row["label"], row["task"]) for row in rows):
        parts = [row for row in rows if (row["label"], row["task"]) == (label, task)]
        row = {**parts[0], "length": None, "questions": sum(part["questions"] for part in parts)}
        for name in ("found", "change"):
            row[name] = sum(part[name] for part in parts) / len(parts)
            errors = (part[f"{name}_error"] for part in parts)
            row[f"{name}_error"] = hypot(*errors) / len(parts)
        found.append(row)
    return found


def _percent(values: Sequence[float]) -> tuple[float, float]:
    """Mean and two standard errors, in percent; the error of one value is not known."""
    from statistics import fmean

    from vllm_eigen.benchmarks.lib.spread import two_errors

    return 100 * fmean(values), 100 * two_errors(values)
