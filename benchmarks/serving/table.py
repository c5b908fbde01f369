"""Medians, spreads and paired ratios of the rows, as Markdown and for the screen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.serving.client import METRICS, PERCENTILES
from benchmarks.serving.rows import Results, Row
from benchmarks.serving.settings import Load


@dataclass(frozen=True)
class Figure:
    """One line of the table: its name, how to read it from a row, and how to print it."""

    label: str
    of: Callable[[Row], float]
    form: str = "{:,.0f}"


def _latency(metric: str, percentile: int) -> Figure:
    key = f"{metric}_p{percentile}"
    return Figure(f"{metric.upper()} p{percentile}, ms", lambda row: row.latency[key], "{:,.2f}")


OUTPUT = Figure("output tokens/s", lambda row: row.output_throughput)
REQUESTS = Figure("requests/s", lambda row: row.request_throughput, "{:,.2f}")
PEAK_RUNNING = Figure("concurrent sequences, peak", lambda row: row.peak_running)
MEAN_RUNNING = Figure("concurrent sequences, mean", lambda row: row.mean_running, "{:,.1f}")
PEAK_USE = Figure("peak KV use, % of pool", lambda row: 100 * row.peak_use, "{:.1f}")
FIGURES = (
    OUTPUT,
    REQUESTS,
    PEAK_RUNNING,
    MEAN_RUNNING,
    *(_latency(metric, percentile) for metric in METRICS for percentile in PERCENTILES),
    Figure("KV pool, MiB", lambda row: row.pool_bytes / 2**20, "{:,.1f}"),
    Figure("KV bytes a token", lambda row: row.bytes_per_token),
    Figure("tokens the pool holds", lambda row: row.capacity_tokens),
    Figure("tokens held, peak", lambda row: row.peak_tokens),
    PEAK_USE,
    Figure("requests queued in the server, peak", lambda row: row.peak_waiting),
    Figure("preemptions", lambda row: row.preemptions),
    Figure("requests completed", lambda row: row.completed),
    Figure("requests FAILED", lambda row: row.failed),
)
SHOWN = (OUTPUT, PEAK_RUNNING, MEAN_RUNNING, *FIGURES[4:13:3], *FIGURES[14:])
"""What the screen shows; the file has everything."""


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread | None:
        """Of some values; None of none."""
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        """Median, and in parentheses the range where there is one."""
        low, high = form.format(self.low), form.format(self.high)
        middle = form.format(self.median)
        return middle if low == high else f"{middle} ({low} to {high})"


def spread(results: Results, figure: Figure, side: str, dtype: str, load: Load) -> Spread | None:
    """A figure over the repeats of one server."""
    return Spread.over(
        [
            figure.of(row)
            for row in results.rows
            if (row.side, row.kv_cache_dtype, row.load) == (side, dtype, load)
        ]
    )


def ratio(results: Results, figure: Figure, dtype: str, load: Load) -> Spread | None:
    """Eigen / base of a figure, repeat by repeat; None where a base is zero or a pair is missing.

    Latencies and preemptions below 1 are a gain, throughput and sequences above 1.
    """
    values = []
    for base in results.rows:
        if (base.side, base.kv_cache_dtype, base.load) != ("base", dtype, load):
            continue
        eigen = results.row("eigen", dtype, load, base.repeat)
        if eigen is not None and figure.of(base) > 0:
            values.append(figure.of(eigen) / figure.of(base))
    return Spread.over(values)


def cells(
    results: Results, dtype: str, load: Load, figures: Sequence[Figure] = FIGURES
) -> list[tuple[str, str, str, str]]:
    """Lines of one load's table: label, base, Eigen, Eigen / base."""
    lines = []
    for figure in figures:
        base = spread(results, figure, "base", dtype, load)
        eigen = spread(results, figure, "eigen", dtype, load)
        both = ratio(results, figure, dtype, load)
        lines.append(
            (
                figure.label,
                base.text(figure.form) if base else "-",
                eigen.text(figure.form) if eigen else "-",
                both.text("{:.2f}") if both else "-",
            )
        )
    one, other = (results.perplexity(side, dtype) for side in ("base", "eigen"))
    lines.append(
        (
            "perplexity, as served",
            f"{one:.3f}" if one else "-",
            f"{other:.3f}" if other else "-",
            f"{other / one:.4f}" if one and other else "-",
        )
    )
    return lines


def groups(results: Results) -> list[tuple[str, Load]]:
    """Cache types and loads that have rows, in the order measured."""
    return list(dict.fromkeys((row.kv_cache_dtype, row.load) for row in results.rows))


def summary(results: Results) -> list[dict[str, object]]:
    """Paired ratios a machine can read, one entry a cache type and load."""
    found: list[dict[str, object]] = []
    for dtype, load in groups(results):
        entry: dict[str, object] = {
            "kv_cache_dtype": dtype,
            "request_rate": load.request_rate,
            "max_concurrency": load.max_concurrency,
            "repeats": max(row.repeat for row in results.rows),
        }
        for name, figure in (
            ("output_throughput", OUTPUT),
            ("peak_running", PEAK_RUNNING),
            ("mean_running", MEAN_RUNNING),
        ):
            both = ratio(results, figure, dtype, load)
            entry[f"{name}_ratio"] = vars(both) if both else None
        found.append(entry)
    return found


def markdown(results: Results) -> str:
    """One table a cache type and load."""
    parts = ["# Serving on the same KV bytes: base and Eigen", "", NOTE, ""]
    models = results.settings["models"]
    names = {side: model.get("name") or model.get("url") for side, model in models.items()}
    parts += [f"Base `{names['base']}`, Eigen `{names['eigen']}`. {_requests(results)}"]
    for dtype, load in groups(results):
        parts += [
            "",
            f"## {load}, cache {dtype}",
            "",
            "| | base | Eigen | Eigen / base |",
            "|---|---|---|---|",
        ]
        parts += [f"| {' | '.join(line)} |" for line in cells(results, dtype, load)]
    errors = [(row.side, *item) for row in results.rows for item in row.errors]
    if errors:
        parts += ["", "## Errors", ""]
        parts += [f"- {side}: {count} x {text}" for side, text, count in errors]
    return "\n".join(parts) + "\n"


NOTE = (
    "Medians over the repeats, smallest and largest in parentheses; `Eigen / base` is the median "
    "of the paired ratios. Both servers have the same flags, pool and prompts. The gain comes from "
    "the pool: where the base has to queue or preempt, more tokens in the same bytes are more "
    "sequences a step. With a pool that nobody fills there is no such gain. Made by `vllm-eigen "
    "bench serve`; commands, versions and machine are in `results.json`."
)


def _requests(results: Results) -> str:
    workload = results.settings["workload"]
    lengths = f"{workload['output_len']} output tokens" if workload["output_len"] else "own lengths"
    if workload["dataset"] == "random":
        lengths = f"{workload['input_len']} input and {lengths}"
    return (
        f"{workload['num_prompts']} requests a run, data set `{workload['dataset']}`, {lengths}; "
        f"`--max-model-len` {results.settings['max_model_len'] or 'as the model'}, "
        f"`--max-num-seqs` {results.settings['max_num_seqs'] or 'default'}."
    )
