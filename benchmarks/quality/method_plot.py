# SPDX-License-Identifier: Apache-2.0
"""The plot of `bench quality`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_eigen.benchmarks.lib import plots
from vllm_eigen.benchmarks.quality.method_rows import Row

TICKS = (-1, -0.5, 0, 0.5, 1, 3, 10, 30, 100, 300)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Perplexity increase against KV ratio, one panel a model; no rows, no plot."""
    if not rows:
        return
    models = list(dict.fromkeys(row.model for row in rows))
    columns = min(4, len(models))
    lines = -(-len(models) // columns)
    figure, axes = plots.pyplot().subplots(
        lines, columns, figsize=(3.4 * columns, 3 * lines), squeeze=False, layout="constrained"
    )
    methods = list(dict.fromkeys(row.method for row in rows))
    usual = {
        model: statistics.mode(
            (row.samples, row.test_seq_len) for row in rows if row.model == model
        )
        for model in models
    }
    for axis, model in zip(axes.flat, models, strict=False):
        for index, method in enumerate(methods):
            mine = [
                row
                for row in rows
                if (row.model, row.method) == (model, method)
                and (row.samples, row.test_seq_len) == usual[model]
            ]
            mine.sort(key=lambda row: row.kv_ratio)
            if mine:
                axis.errorbar(
                    [row.kv_ratio for row in mine],
                    [row.increase for row in mine],
                    [row.noise for row in mine],
                    label=method,
                    color=f"C{index}",
                    linestyle="--" if method == "released" else "-",
                    marker="o",
                    markersize=3,
                    linewidth=1.2,
                )
        axis.set_title(model, fontsize=10)
        axis.set_yscale("symlog", linthresh=1)
        lowest = min(row.increase - row.noise for row in rows if row.model == model)
        axis.set_ylim(bottom=min(-0.25, 1.1 * lowest))
        axis.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.invert_xaxis()
    for axis in list(axes.flat)[len(models) :]:
        axis.set_visible(False)
    figure.supxlabel("KV cache relative to uncompressed")
    figure.supylabel("perplexity increase, %")
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = [method for method in methods if method in found]
    handles = [found[method] for method in labels]
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(labels), 2 * columns),
        frameon=False,
    )
    plots.save(figure, path)
