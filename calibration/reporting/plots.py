# SPDX-License-Identifier: Apache-2.0
"""The plots of a report as PNG files: spectra, ranks, losses, quality against KV bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from vllm_eigen.calibration.reporting.sweep import SweepPoint
from vllm_eigen.checkpoint.config import EigenConfig

_KEY, _VALUE = "#1f5fa8", "#c4572e"
_DPI = 130


@dataclass(frozen=True)
class CheckpointPoint:
    """One checkpoint's quality: KV ratio and relative perplexity increase, e.g. 0.02 for 2 %."""

    label: str
    kv_ratio: float
    increase: float


def spectrum(path: Path, layers: Sequence[Mapping[str, Sequence[float]]]) -> None:
    """Singular values of keys and values by rank, a line a layer (paper, Fig. 2)."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    shades = _shades(len(layers))
    lowest = 1.0
    for axis, part, title in zip(axes, ("key", "value"), ("keys", "values"), strict=True):
        for index, layer in enumerate(layers):
            values = [value for value in layer[part] if value > 0]
            lowest = min([lowest, *values])
            shade = shades(index / max(1, len(layers) - 1))
            axis.plot(range(1, len(values) + 1), values, color=shade, linewidth=1.2)
        axis.set(title=title, xlabel="direction", yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("singular value, relative")
    axes[0].set_ylim(bottom=max(lowest, 1e-6) * 0.8, top=1.3)
    norm = matplotlib.colors.Normalize(0, max(1, len(layers) - 1))
    scale = plt.cm.ScalarMappable(norm, shades)
    bar = figure.colorbar(scale, ax=axes, label="layer", fraction=0.03)
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    _save(figure, path)


def ranks(path: Path, eigen: EigenConfig) -> None:
    """Ranks of keys and values by layer (paper, Fig. 5)."""
    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    full = eigen.head_size * eigen.head_group
    where = eigen.layer_indices
    keys = [layer.rank_k for layer in eigen.layers]
    values = [layer.rank_v for layer in eigen.layers]
    axis.bar([x - 0.2 for x in where], keys, 0.4, color=_KEY, label="keys")
    axis.bar([x + 0.2 for x in where], values, 0.4, color=_VALUE, label="values")
    axis.axhline(full, color="0.4", linestyle="--", linewidth=1, label=f"full rank, {full}")
    axis.set(xlabel="layer", ylabel="rank", ylim=(0, full * 1.08))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_axisbelow(True)
    axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axis.grid(axis="y", alpha=0.3)
    _save(figure, path)


def losses(path: Path, layers: Sequence[Mapping[str, Any]], full: int) -> None:
    """KL a token when one layer's keys or values alone are compressed, a line a layer."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    shades = _shades(len(layers))
    for axis, part, title in zip(axes, ("key", "value"), ("keys", "values"), strict=True):
        for index, layer in enumerate(layers):
            shade = shades(index / max(1, len(layers) - 1))
            curve = layer[part]
            axis.plot(curve["ranks"], curve["losses"], "o-", color=shade, ms=4, label=str(index))
        axis.set(title=title, xlabel="rank", yscale="log", xlim=(0, full))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL a token, nats")
    if len(layers) <= 12:
        axes[1].legend(title="layer", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def quality(path: Path, points: Sequence[CheckpointPoint]) -> None:
    """Relative perplexity increase against KV bytes, a line a method (paper, Fig. 3)."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for label in dict.fromkeys(point.label for point in points):
        mine = sorted((p.kv_ratio, p.increase) for p in points if p.label == label)
        axis.plot([x for x, _ in mine], [100 * y for _, y in mine], "o-", label=label)
    axis.axhline(0, color="0.4", linewidth=1)
    axis.set(xlabel="KV bytes relative to the base model", ylabel="perplexity increase, %")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    _save(figure, path)


def bytes_curve(path: Path, points: Sequence[SweepPoint]) -> None:
    """Perplexity against KV bytes, with a 16-bit and with an fp8 cache (paper, Fig. 3)."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    base = points[0].quality.base_perplexity
    for fp8, label, color in ((False, "16-bit cache", _KEY), (True, "fp8 cache", _VALUE)):
        mine = sorted((p.bytes_ratio, p.quality.eigen_perplexity) for p in points if p.fp8 == fp8)
        axis.plot([x for x, _ in mine], [y for _, y in mine], "o-", color=color, label=label)
    axis.axhline(base, color="0.4", linestyle="--", linewidth=1, label="base model")
    axis.set(xlabel="KV bytes relative to the base model's at 16 bits", ylabel="perplexity")
    axis.set(xlim=(0, None))
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    _save(figure, path)


def samples_curve(path: Path, points: Sequence[SweepPoint]) -> None:
    """Perplexity against the number of calibration windows (paper, Fig. 4)."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    counts = [point.samples for point in points]
    found = [point.quality.eigen_perplexity for point in points]
    label = f"KV ratio {points[-1].kv_ratio:.2f}"
    axis.plot(counts, found, "o-", color=_KEY, label=label)
    base = points[0].quality.base_perplexity
    axis.axhline(base, color="0.4", linestyle="--", linewidth=1, label="base model")
    axis.set(xlabel="calibration windows", ylabel="perplexity", xscale="log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    _save(figure, path)


def finetuning(path: Path, losses: Sequence[tuple[int, float]]) -> None:
    """Held-out perplexity while fine-tuning, from its log (paper, Fig. 4)."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    steps = [step for step, _ in losses]
    axis.plot(steps, np.exp([loss for _, loss in losses]), "o-", color=_KEY, ms=4)
    axis.set(xlabel="fine-tuning steps", ylabel="held-out perplexity", xlim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    _save(figure, path)


def _shades(count: int) -> Any:
    """Colours of layers, without the yellow end that does not show on white."""
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.88, max(2, count)))
    return matplotlib.colors.LinearSegmentedColormap.from_list("layers", shades)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
