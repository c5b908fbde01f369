# SPDX-License-Identifier: Apache-2.0
"""Medians, ranges and paired ratios of the rows, as Markdown and for the screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from vllm_eigen.benchmarks.lib.markdown import table
from vllm_eigen.benchmarks.lib.spread import Spread
from vllm_eigen.benchmarks.serving.client import LATENCIES, PERCENTILES
from vllm_eigen.benchmarks.serving.rows import Results, Row
from vllm_eigen.benchmarks.serving.settings import Load


@dataclass(frozen=True)
class Metric:
    """One line of the table: its name, how to read it from a row, and how to print it."""

    label: str
    of: Callable[[Row], float]
    form: str = "{:,.0f}"


def _latency(name: str, percentile: int) -> Metric:
    key = f"{name}_p{percentile}"
    return Metric(f"{name.upper()} p{percentile}, ms", lambda row: row.latency[key], "{:,.2f}")


OUTPUT = Metric("output tokens/s", lambda row: row.output_throughput)
REQUESTS = Metric("requests/s", lambda row: row.request_throughput, "{:,.2f}")
PEAK_RUNNING = Metric("concurrent sequences, peak", lambda row: row.peak_running)
MEAN_RUNNING = Metric("concurrent sequences, mean", lambda row: row.mean_running, "{:,.1f}")
PEAK_USE = Metric("peak KV use, % of pool", lambda row: 100 * row.peak_use, "{:.1f}")
LATENCY = {(name, p): _latency(name, p) for name in LATENCIES for p in PERCENTILES}
"""By name and percentile; TTFT: to the first token, TPOT: of each further one of a request, ITL:
between tokens as they arrive."""
COUNTS = (
    Metric("tokens the pool holds", lambda row: row.capacity_tokens),
    Metric("tokens held, peak", lambda row: row.peak_tokens),
    PEAK_USE,
    Metric("requests queued in the server, peak", lambda row: row.peak_waiting),
    Metric("preemptions", lambda row: row.preemptions),
    Metric("requests completed", lambda row: row.completed),
    Metric("requests FAILED", lambda row: row.failed),
)
METRICS = (
    OUTPUT,
    REQUESTS,
    PEAK_RUNNING,
    MEAN_RUNNING,
    *LATENCY.values(),
    Metric("KV pool, MiB", lambda row: row.pool_bytes / 2**20, "{:,.1f}"),
    Metric("KV bytes a token", lambda row: row.bytes_per_token),
    *COUNTS,
)
SHOWN = (
    *(OUTPUT, PEAK_RUNNING, MEAN_RUNNING),
    *(metric for (_, percentile), metric in LATENCY.items() if percentile == 50),
    *COUNTS,
)
"""What the screen shows; the file has everything."""


def _extremes(values: Sequence[float]) -> Spread | None:
    return Spread.extremes(values) if values else None


def spread(results: Results, metric: Metric, side: str, dtype: str, load: Load) -> Spread | None:
    """A metric over the repeats of one server; None without any."""
    return _extremes(
        [
            metric.of(row)
            for row in results.rows
            if (row.side, row.kv_cache_dtype, row.load) == (side, dtype, load)
        ]
    )


def ratio(results: Results, metric: Metric, dtype: str, load: Load) -> Spread | None:
    """Eigen / base of a metric, repeat by repeat; None where a base is zero or a pair is missing.

    Latencies and preemptions below 1 are a gain, throughput and sequences above 1.
    """
    values = []
    for base in results.rows:
        if (base.side, base.kv_cache_dtype, base.load) != ("base", dtype, load):
            continue
        eigen = results.row("eigen", dtype, load, base.repeat)
        if eigen is not None and metric.of(base) > 0:
            values.append(metric.of(eigen) / metric.of(base))
    return _extremes(values)


def cells(
    results: Results, dtype: str, load: Load, metrics: Sequence[Metric] = METRICS
) -> list[tuple[str, str, str, str]]:
    """Lines of one load's table: label, base, Eigen, Eigen / base."""
    lines = []
    for metric in metrics:
        base = spread(results, metric, "base", dtype, load)
        eigen = spread(results, metric, "eigen", dtype, load)
        both = ratio(results, metric, dtype, load)
        lines.append(
            (
                metric.label,
                base.text(metric.form) if base else "-",
                eigen.text(metric.form) if eigen else "-",
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
    compared = {
        "output_throughput": OUTPUT,
        "peak_running": PEAK_RUNNING,
        "mean_running": MEAN_RUNNING,
        **{f"{name}_p{percentile}": metric for (name, percentile), metric in LATENCY.items()},
    }
    for dtype, load in groups(results):
        entry: dict[str, object] = {
            "kv_cache_dtype": dtype,
            "request_rate": load.request_rate,
            "max_concurrency": load.max_concurrency,
            "repeats": _repeats(results, dtype, load),
        }
        for name, metric in compared.items():
            both = ratio(results, metric, dtype, load)
            entry[f"{name}_ratio"] = asdict(both) if both else None
        found.append(entry)
    return found


def markdown(results: Results) -> str:
    """One table a cache type and load."""
    parts = ["# Serving on the same KV bytes: base and Eigen", "", NOTE, ""]
    models = results.settings["models"]
    names = {side: model.get("name") or model.get("url") for side, model in models.items()}
    parts += [f"Base `{names['base']}`, Eigen `{names['eigen']}`. {_requests(results)}"]
    for dtype, load in groups(results):
        parts += ["", f"## {load}, cache {dtype}, {_repeats(results, dtype, load)} repeats", ""]
        parts += table(("metric", "base", "Eigen", "Eigen / base"), cells(results, dtype, load))
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
    "bench serve`; commands, versions and machine are in the JSON beside it."
)


def _repeats(results: Results, dtype: str, load: Load) -> int:
    return len(
        {row.repeat for row in results.rows if (row.kv_cache_dtype, row.load) == (dtype, load)}
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
