"""What calibration needs: samples for quality, time and memory for the model's size.

`python -m benchmarks.calibration --models DIR ... --text FILE --test FILE --output FILE.json`
writes the table as JSON and as Markdown beside it, and a plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.calibration_cost import LENGTH, CostRow, measure_cost
from benchmarks.calibration_samples import RATIO, SampleRow, measure_samples
from calibration.progress import Reporter
from vllm_eigen import provenance
from vllm_eigen.errors import EigenError
from vllm_eigen.files import atomic_file

_COLORS = ("#1f5fa8", "#c4572e", "#4a8f3c", "#8a5fb0")


def markdown(samples: Sequence[SampleRow], costs: Sequence[CostRow]) -> str:
    """Both tables."""
    parts = ["# What calibration needs", ""]
    if samples:
        parts += [
            f"Relative perplexity increase in percent at KV ratio {RATIO:g}, by calibration "
            "windows; a text that gives fewer is used whole. Offline in transformers' layers, "
            "float32.",
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
        parts.append("")
    return "\n".join(parts)


def plot(path: Path, samples: Sequence[SampleRow], costs: Sequence[CostRow]) -> None:
    """Increase against windows; time and memory against layers, width and windows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(18, 4.6), layout="constrained")
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
    axes[0].set(title=f"quality at ratio {RATIO:g}", xlabel="windows", xscale="log")
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--models", nargs="+", default=[], metavar="DIR", help="trained models")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="calibration text")
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE", help="held-out text")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a window (%(default)s)")
    parser.add_argument("--test-tokens", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-cost", action="store_true", help="leave out time and memory")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args(argv)
    with Reporter() as reporter:
        try:
            samples = measure_samples(args, reporter) if args.models else []
            costs = [] if args.no_cost else measure_cost(reporter)
        except EigenError as error:
            reporter.note(f"benchmarks.calibration: {error}")
            return error.exit_code
    record: dict[str, Any] = {
        **provenance.collect(sys.argv if argv is None else argv),
        "samples": [asdict(row) for row in samples],
        "costs": [asdict(row) for row in costs],
    }
    with atomic_file(args.output) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with atomic_file(args.output.with_suffix(".md")) as path:
        path.write_text(markdown(samples, costs), encoding="utf-8")
    plot(args.output.with_suffix(".png"), samples, costs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
