"""Plots of a serving benchmark: a panel a figure, against concurrency or request rate."""

from __future__ import annotations

from pathlib import Path

from benchmarks.serving.rows import Results
from benchmarks.serving.settings import SIDES, Load
from benchmarks.serving.table import FIGURES, MEAN_RUNNING, OUTPUT, PEAK_USE, spread
from vllm_eigen.files import atomic_file

_LATENCIES = (figure for figure in FIGURES if figure.label.endswith(" ms"))
PANELS = (
    OUTPUT,
    MEAN_RUNNING,
    PEAK_USE,
    *(figure for figure in _LATENCIES if "p90" not in figure.label),
)


def plot(folder: Path, results: Results) -> list[Path]:
    """Draw `concurrency.png` and `rate.png`, each if there are rows of that kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    for name, axis_label, loads in _sweeps(results):
        figure, axes = plt.subplots(3, 3, figsize=(11, 8.5), layout="constrained")
        for axis, panel in zip(axes.flat, PANELS, strict=True):
            for dtype in dict.fromkeys(row.kv_cache_dtype for row in results.rows):
                for side in SIDES:
                    found = [
                        (x, values)
                        for x, load in loads
                        if (values := spread(results, panel, side, dtype, load))
                    ]
                    axis.errorbar(
                        [x for x, _ in found],
                        [values.median for _, values in found],
                        [
                            [values.median - values.low for _, values in found],
                            [values.high - values.median for _, values in found],
                        ],
                        label=f"{side}, cache {dtype}",
                        color="C0" if side == "base" else "C1",
                        linestyle="-" if dtype == "auto" else "--",
                        marker="o",
                        markersize=3,
                        capsize=2,
                    )
            axis.set_title(panel.label, fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        figure.supxlabel(axis_label)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        path = folder / f"{name}.png"
        with atomic_file(path) as work:
            figure.savefig(work, dpi=110, format="png")
        plt.close(figure)
        drawn.append(path)
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
