# SPDX-License-Identifier: Apache-2.0
"""The tables and the plot of `bench calibration`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_eigen.benchmarks.calibration.cost import LENGTH, CostRow
from vllm_eigen.benchmarks.calibration.samples import SampleRow
from vllm_eigen.benchmarks.lib import plots

_COLORS = ("#1f5fa8", "#c4572e", "#4a8f3c", "#8a5fb0")


def markdown(samples: Sequence[SampleRow], costs: Sequence[CostRow]) -> str:
    """Both tables."""
    parts = ["# What calibration needs", ""]
    if samples:
        parts += [
            f"Relative perplexity increase in percent at KV ratio {_ratios(samples)}, by "
            "calibration windows; a text that gives fewer is used whole. Offline in transformers' "
            "layers, float32.",
            "",
            "| model | method | tokens a window | windows | increase, % | KL a token |",
            "|---|---|---|---|---|---|",
        ]
        parts += [
            f"| {row.model} | {row.method} | {row.length} | {row.samples} | {row.increase:+.2f} "
            f"| {row.kl:.5f} |"
            for row in samples
        ]
        parts.append("")
    if costs:
        parts += [
            "Time and peak memory of the whole command on random Llama models, windows of "
            f"{LENGTH} tokens; one of layers, width and windows varies at a time.",
            "",
            "| varies | layers | width | windows | layer, MiB | model, MiB | seconds | peak, MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        parts += [
            f"| {row.varies} | {row.layers} | {row.width} | {row.samples} "
            f"| {row.layer_bytes / 2**20:.1f} | {row.model_bytes / 2**20:.0f} | {row.seconds:.1f} "
            f"| {row.peak_bytes / 2**20:.0f} |"
            for row in costs
        ]
        parts += ["", *_fits(costs), ""]
    return "\n".join(parts)


def _fits(costs: Sequence[CostRow]) -> list[str]:
    """Time as a line in layers and in windows (least squares), and the largest deviation of it."""
    lines = []
    for varies, name in (("layers", "layers"), ("samples", "windows")):
        rows = [row for row in costs if row.varies == varies]
        where = np.array([getattr(row, varies) for row in rows], dtype=float)
        seconds = np.array([row.seconds for row in rows])
        if len(set(where)) < 3:  # Two points are always on a line.
            continue
        slope, start = np.polyfit(where, seconds, 1)
        worst = float(np.max(np.abs(start + slope * where - seconds) / seconds))
        lines.append(
            f"- by {name}: {start:.1f} s + {slope:.2f} s x {name}, off by {worst:.0%} at most"
        )
    return ["Seconds, fitted by a line:", "", *lines] if lines else []


def _ratios(samples: Sequence[SampleRow]) -> str:
    return " and ".join(
        f"{ratio:g}" for ratio in sorted({round(row.kv_ratio, 2) for row in samples})
    )


def plot(path: Path, samples: Sequence[SampleRow], costs: Sequence[CostRow]) -> None:
    """Increase against windows; time and memory against layers, width and windows."""
    figure, axes = plots.pyplot().subplots(1, 4, figsize=(18, 4.6), layout="constrained")
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    below |= {"frameon": False, "fontsize": 8}
    for index, model in enumerate(dict.fromkeys(row.model for row in samples)):
        for method in dict.fromkeys(row.method for row in samples):
            mine = [row for row in samples if (row.model, row.method) == (model, method)]
            axes[0].plot(
                [row.samples for row in mine],
                [row.increase for row in mine],
                "o--" if method == "paper" else "o-",
                color=_COLORS[index % len(_COLORS)],
                label=f"{model}, {method}",
            )
    axes[0].set(title=f"quality at ratio {_ratios(samples)}", xlabel="windows", xscale="log")
    axes[0].set(ylabel="perplexity increase, %")
    if samples:
        axes[0].set_yscale("symlog", linthresh=1)
        axes[0].set_yticks([0, 0.5, 1, 3, 10, 30], ["0", "0.5", "1", "3", "10", "30"])
        axes[0].legend(ncols=2, **below)
        ticks = sorted({row.samples for row in samples})
        axes[0].set_xticks(ticks, [str(tick) for tick in ticks])
        axes[0].minorticks_off()
    for axis, varies in zip(axes[1:], ("layers", "width", "samples"), strict=True):
        mine_costs = [row for row in costs if row.varies == varies]
        where = [getattr(row, varies) for row in mine_costs]
        axis.plot(
            where, [row.seconds for row in mine_costs], "o-", color=_COLORS[0], label="seconds"
        )
        twin = axis.twinx()
        for name, style in (("peak_bytes", "s-"), ("model_bytes", ":")):
            twin.plot(
                where,
                [getattr(row, name) / 2**20 for row in mine_costs],
                style,
                color=_COLORS[1],
                label="peak memory" if name == "peak_bytes" else "the model's layers",
            )
        axis.set(
            title=f"cost against {'windows' if varies == 'samples' else varies}", ylim=(0, None)
        )
        axis.set(xlabel="windows" if varies == "samples" else varies)
        axis.set_ylabel("seconds", color=_COLORS[0])
        twin.set_ylim(bottom=0)
        twin.set_ylabel("MiB", color=_COLORS[1])
        lines = [*axis.get_lines(), *twin.get_lines()]
        axis.legend(lines, [str(line.get_label()) for line in lines], ncols=3, **below)
    for axis in axes:
        axis.grid(alpha=0.3)
    plots.save(figure, path)
