# SPDX-License-Identifier: Apache-2.0
"""Plots of a serving benchmark: a panel a metric, against concurrency or request rate."""

from __future__ import annotations

from pathlib import Path

from vllm_eigen.benchmarks.lib import plots
from vllm_eigen.benchmarks.serving.rows import Results
from vllm_eigen.benchmarks.serving.settings import SIDES, Load
from vllm_eigen.benchmarks.serving.table import LATENCY, MEAN_RUNNING, OUTPUT, PEAK_USE, spread

PANELS = (
    OUTPUT,
    MEAN_RUNNING,
    PEAK_USE,
    *(metric for (_, percentile), metric in LATENCY.items() if percentile != 90),
)


def plot(folder: Path, results: Results) -> list[Path]:
    """Draw `concurrency.png` and `rate.png`, each if there are rows of that kind."""
    drawn = []
    for name, axis_label, loads in _sweeps(results):
        figure, axes = plots.pyplot().subplots(3, 3, figsize=(11, 8.5), layout="constrained")
        for axis, metric in zip(axes.flat, PANELS, strict=True):
            for dtype in dict.fromkeys(row.kv_cache_dtype for row in results.rows):
                for side in SIDES:
                    found = [
                        (x, values)
                        for x, load in loads
                        if (values := spread(results, metric, side, dtype, load))
                    ]
                    below = [values.median - values.low for _, values in found]
                    above = [values.high - values.median for _, values in found]
                    axis.errorbar(
                        [x for x, _ in found],
                        [values.median for _, values in found],
                        [below, above],
                        label=f"{side}, cache {dtype}",
                        color="C0" if side == "base" else "C1",
                        linestyle="-" if dtype == "auto" else "--",
                        marker="o",
                        markersize=3,
                        capsize=2,
                    )
            axis.set_title(metric.label, fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        figure.supxlabel(axis_label)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        drawn.append(folder / f"{name}.png")
        plots.save(figure, drawn[-1])
    return drawn


def _sweeps(results: Results) -> list[tuple[str, str, list[tuple[float, Load]]]]:
    """File name, axis label and points of each sweep; all at once has no place on an axis."""
    loads = list(dict.fromkeys(row.load for row in results.rows))
    users = [
        (float(load.max_concurrency), load) for load in loads if load.max_concurrency is not None
    ]
    rates = [(load.request_rate, load) for load in loads if load.request_rate is not None]
    sweeps: list[tuple[str, str, list[tuple[float, Load]]]] = []
    if users:
        sweeps.append(("concurrency", "requests open at once", sorted(users, key=lambda x: x[0])))
    if rates:
        sweeps.append(("rate", "requests a second", sorted(rates, key=lambda x: x[0])))
    return sweeps
