"""What each calibration method costs in quality: the results table, its Markdown and its plot.

    python -m benchmarks.quality --models DIR... --text CALIB --test TEST --csv FILE

Every method is calibrated on one text and compared with its base on another, both streamed
through plain transformers in float32, by the code that `vllm-eigen calibrate` runs. Rows of other
models and methods in FILE are kept, so that models of different texts share a table; FILE's
neighbours FILE.md, FILE.png and FILE.json (provenance of every row's run) are made anew.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from calibration.allocate import allocate_ranks
from calibration.layers import LayerPass
from calibration.methods import get_method
from calibration.methods.base import LayerBases
from calibration.metrics import Comparison, Quality
from calibration.probe import TOKENS, probe
from calibration.progress import Reporter
from calibration.ranks import ErrorCurve, budget_for_ratio, ranks_at, sweep
from calibration.refit import refit, share
from calibration.source import open_source
from calibration.state import State
from calibration.stream import Skeleton, Stream, pick_device
from calibration.taps import compress
from calibration.text import all_windows, read_files, sample_windows
from vllm_eigen import provenance
from vllm_eigen.checkpoint import LayerRanks
from vllm_eigen.errors import EigenError, UsageError
from vllm_eigen.families import KeyMode

RATIOS = (0.8, 0.7, 0.6, 0.5)
METHODS = ("paper", "released", "sensitivity", "sensitivity:2")


@dataclass(frozen=True)
class Variant:
    """A method as the table names it: `NAME[:HEAD_GROUP][:post-rope][:no-refit]`."""

    label: str
    method: str
    head_group: int
    post_rope: bool
    no_refit: bool = False

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read a label."""
        name, *options = text.split(":")
        group = [int(part) for part in options if part.isdigit()]
        return cls(text, name, (group or [1])[0], "post-rope" in options, "no-refit" in options)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kv_ratio: asked for; `reached` is what the ranks come to.
        perplexity, base_perplexity: on the test windows.
        increase: relative perplexity increase in percent.
        noise: two standard errors of it, from the paired differences of the test windows.
        kl: KL(base || compressed) per token, in nats.
        top1: agreement of the likeliest tokens, in percent.
        samples, seq_len: windows of the calibration and their tokens.
    """

    model: str
    method: str
    samples: int
    seq_len: int
    kv_ratio: float
    reached: float
    base_perplexity: float
    perplexity: float
    increase: float
    noise: float
    kl: float
    top1: float
    tokens: int
    rank_k: str
    rank_v: str

    @property
    def key(self) -> tuple[str, str, int, float]:
        """What makes a row unique."""
        return (self.model, self.method, self.samples, self.kv_ratio)


class Bench:
    """One model with its calibration and test windows."""

    def __init__(self, model: str, args: argparse.Namespace, reporter: Reporter) -> None:
        self.source = open_source(model)
        self.skeleton = Skeleton(self.source, pick_device(args.device))
        self.reporter = reporter
        tokenizer = self.source.tokenizer()
        length = min(args.seq_len, self.source.max_positions)
        size = self.source.vocab_size
        windows = sample_windows(
            read_files(args.text),
            tokenizer,
            samples=args.samples,
            length=length,
            seed=args.seed,
            vocab_size=size,
        )
        self.calibration = windows.chosen
        self.test = all_windows(
            read_files(args.test),
            tokenizer,
            length=length,
            vocab_size=size,
            limit=args.test_tokens,
        )
        self.base = Stream(self.skeleton, self.test)
        self._run(self.base, self.skeleton, None, None, self.source.family.key_modes[0])

    def rows(self, variant: Variant, ratios: Sequence[float]) -> list[Row]:
        """Calibrate once, then choose ranks and measure for every ratio."""
        mode: KeyMode = "post-rope" if variant.post_rope else self.source.family.key_modes[0]
        bases, curves = self._calibrate(variant, mode)
        losses = None
        if get_method(variant.method).rank_rule == "global":
            length = self.calibration.shape[1]
            tokens = self.calibration[: max(1, TOKENS // length)]
            losses = probe(self.skeleton, tokens, bases, mode)
        rows = []
        for ratio in ratios:
            if losses is not None:
                ranks = allocate_ranks(bases, losses, ratio)
            else:
                try:
                    _, thresholds = budget_for_ratio(bases, curves, ratio)
                except UsageError as error:
                    self.reporter.note(f"{variant.label}: {error}")
                    continue
                ranks = [ranks_at(*pair) for pair in zip(bases, thresholds, strict=True)]
            rows.append(self._row(variant, ratio, bases, ranks, mode))
            self.reporter.note(
                f"{self.source.name} {variant.label} {ratio:g}: "
                f"{rows[-1].increase:+.2f} % (noise {rows[-1].noise:.2f})"
            )
        return rows

    def _calibrate(
        self, variant: Variant, mode: KeyMode
    ) -> tuple[list[LayerBases], list[ErrorCurve]]:
        method = get_method(variant.method)
        state = State({"benchmark": "quality"}, resume=False, provenance={})
        rule = sweep
        if method.rank_rule == "global":
            rule = _no_curve
        layers = LayerPass(self.skeleton, method, mode, variant.head_group, rule)
        results = layers.run(Stream(self.skeleton, self.calibration), state, self.reporter)
        state.discard()
        return [result.bases for result in results], [result.curve for result in results]

    def _run(
        self,
        stream: Stream,
        skeleton: Skeleton,
        bases: Sequence[LayerBases] | None,
        ranks: Sequence[LayerRanks] | None,
        mode: KeyMode,
    ) -> None:
        for index in range(self.skeleton.num_layers):
            layer = skeleton.layer(index)
            key = value = None
            if bases is not None and ranks is not None:
                key = bases[index].key.at(ranks[index].rank_k)
                value = bases[index].value.at(ranks[index].rank_v)
            family, geometry = self.source.family, self.source.geometry
            with compress(layer, family, geometry, mode, key, value):
                for _ in stream.advance(index, layer):
                    pass

    def _row(
        self,
        variant: Variant,
        ratio: float,
        bases: Sequence[LayerBases],
        ranks: Sequence[LayerRanks],
        mode: KeyMode,
    ) -> Row:
        stream = Stream(self.skeleton, self.test)
        skeleton = self.skeleton
        if get_method(variant.method).refit and not variant.no_refit:
            state = State({"benchmark": "refit"}, resume=False, provenance={})
            tokens = share(skeleton, self.calibration)
            first, second = (Stream(skeleton, tokens) for _ in range(2))
            bases, skeleton = refit(
                skeleton,
                first,
                second,
                bases,
                ranks,
                mode,
                variant.head_group,
                state,
                self.reporter,
            )
            state.discard()
        self._run(stream, skeleton, bases, ranks, mode)
        windows: list[Quality] = []
        for row in range(len(self.test)):
            part = slice(row, row + 1)
            exact = self.skeleton.logits(self.test[part], self.base.hidden[part])
            found = self.skeleton.logits(self.test[part], stream.hidden[part])
            comparison = Comparison()
            comparison.add(exact, found, self.test[part])
            windows.append(comparison.result())
        base = statistics.fmean(math.log(item.base_perplexity) for item in windows)
        gaps = [math.log(item.eigen_perplexity / item.base_perplexity) for item in windows]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        growth = math.exp(statistics.fmean(gaps))
        full = sum(item.key.full_rank + item.value.full_rank for item in bases)
        return Row(
            model=self.source.name,
            method=variant.label,
            samples=len(self.calibration),
            seq_len=self.calibration.shape[1],
            kv_ratio=ratio,
            reached=round(sum(item.rank_k + item.rank_v for item in ranks) / full, 4),
            base_perplexity=round(math.exp(base), 5),
            perplexity=round(math.exp(base) * growth, 5),
            increase=round(100 * (growth - 1), 3),
            noise=round(200 * error * growth, 3),
            kl=round(statistics.fmean(item.kl_per_token for item in windows), 6),
            top1=round(100 * statistics.fmean(item.top1_agreement for item in windows), 2),
            tokens=sum(item.tokens for item in windows),
            rank_k=" ".join(str(item.rank_k) for item in ranks),
            rank_v=" ".join(str(item.rank_v) for item in ranks),
        )


def _no_curve(error_at: Any) -> ErrorCurve:
    return ErrorCurve((1.0,), (0.0,))


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier table; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        kinds = {
            field.name: {"str": str, "int": int, "float": float}[str(field.type)]
            for field in fields(Row)
        }
        return [
            Row(**{name: kinds[name](value) for name, value in line.items()})
            for line in csv.DictReader(file)
        ]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The table as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def markdown(rows: Sequence[Row]) -> str:
    """One table a model: a line per method, a column per ratio."""
    parts = ["# Quality of the calibration methods", "", NOTE]
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        ratios = sorted({row.kv_ratio for row in mine}, reverse=True)
        first = mine[0]
        parts += [
            "",
            f"## {model}",
            "",
            f"Perplexity {first.base_perplexity:.3f} uncompressed, {first.tokens} test tokens, "
            f"windows of {first.seq_len}.",
            "",
            "| method | samples | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
            "|---|---|" + "---|" * len(ratios),
        ]
        for method, samples in dict.fromkeys((row.method, row.samples) for row in mine):
            cells = {
                row.kv_ratio: f"{row.increase:+.2f} ± {row.noise:.2f} ({row.top1:.1f})"
                for row in mine
                if (row.method, row.samples) == (method, samples)
            }
            line = " | ".join(cells.get(ratio, "-") for ratio in ratios)
            parts.append(f"| {method} | {samples} | {line} |")
    return "\n".join(parts) + "\n"


NOTE = (
    "Relative perplexity increase in percent by KV ratio, ± two standard errors over the test "
    "windows (paired), and in parentheses the percentage of positions where the likeliest token "
    "stays the same. Float32 in plain transformers, not the engine. `NAME:G` has G KV heads to a "
    "latent head, `post-rope` caches keys after the rotary embedding, `no-refit` keeps the "
    "output projections. Made by "
    "`python -m benchmarks.quality`; commands, versions and machine are in `quality.json`."
)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Perplexity increase against KV ratio, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row.model for row in rows))
    columns = min(4, len(models))
    lines = -(-len(models) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 3 * lines), squeeze=False, layout="constrained"
    )
    methods = list(dict.fromkeys(row.method for row in rows))
    usual = {
        model: statistics.mode(row.samples for row in rows if row.model == model)
        for model in models
    }
    for axis, model in zip(axes.flat, models, strict=False):
        for index, method in enumerate(methods):
            mine = [
                row
                for row in rows
                if (row.model, row.method, row.samples) == (model, method, usual[model])
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
        axis.set_ylim(bottom=-0.25)
        axis.set_yticks([0, 0.5, 1, 3, 10, 30], ["0", "0.5", "1", "3", "10", "30"], minor=False)
        axis.grid(alpha=0.3)
        axis.invert_xaxis()
    for axis in list(axes.flat)[len(models) :]:
        axis.set_visible(False)
    figure.supxlabel("KV cache relative to uncompressed")
    figure.supylabel("perplexity increase, %")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--models", nargs="+", default=[], metavar="DIR")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="calibration text")
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE", help="held-out text")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME[:GROUP]")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--test-tokens", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path, required=True, help="table to add to")
    args = parser.parse_args(argv)
    rows = {row.key: row for row in read_rows(args.csv)}
    log = args.csv.with_suffix(".json")
    runs: list[dict[str, Any]] = json.loads(log.read_text()) if log.exists() else []
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with Reporter() as reporter:
        for model in args.models:
            try:
                bench = Bench(model, args, reporter)
                for label in args.methods:
                    found = bench.rows(Variant.parse(label), args.ratios)
                    rows.update({row.key: row for row in found})
                    write_rows(args.csv, list(rows.values()))
            except EigenError as error:
                reporter.note(f"{Path(model).name}: {error}")
                failed = True
    if args.models:
        runs.append(
            {
                "models": [Path(model).name for model in args.models],
                **provenance.collect(sys.argv if argv is None else argv),
            }
        )
        log.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    table = list(rows.values())
    args.csv.with_suffix(".md").write_text(markdown(table), encoding="utf-8")
    plot(args.csv.with_suffix(".png"), table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
