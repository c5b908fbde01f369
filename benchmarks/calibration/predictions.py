# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench predictions`: what `calibrate --dry-run` foretells, against what it takes.

Models are calibrated as they are. A shape is a large model's sizes: random models of it with a few
layers are calibrated, and what the whole one would take is extrapolated by a line through them.
Writes the result as JSON, and its table as Markdown beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_eigen.benchmarks.lib.shapes import SHAPES
from vllm_eigen.common.errors import UsageError

if TYPE_CHECKING:
    from vllm_eigen.calibration.predict import Prediction
    from vllm_eigen.common.progress import Reporter

HELP = "time and memory that calibrate foretells, against what it takes"
RATIO = 0.27
TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True)
class PredictionRow:
    """One calibration.

    Attributes:
        layers: of the model.
        measured: whether it was run; otherwise seconds and bytes are extrapolated.
        seconds, peak_bytes: of the whole command; resident memory.
        foretold_seconds, foretold_peak_bytes: the same, before it ran.
    """

    model: str
    layers: int
    measured: bool
    seconds: float
    foretold_seconds: float
    peak_bytes: int
    foretold_peak_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--models", nargs="+", default=[], metavar="DIR", help="to calibrate")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        choices=tuple(SHAPES),
        metavar="NAME",
        help=f"sizes of random models: {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        default=[2, 4],
        metavar="N",
        help="layers of the random models that are run (2 4)",
    )
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="for the models")
    parser.add_argument("--samples", type=int, default=32, help="windows (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="result")


def run(args: argparse.Namespace) -> int:
    """Measure and write.

    Raises:
        UsageError: shapes are to be extrapolated from one depth.
        InputError: a model or a text cannot be used.
        EngineError: a calibration failed.
    """
    from vllm_eigen.benchmarks.lib.results import collect_provenance, write_json, write_text
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    if args.shapes and len(set(args.layers)) < 2:
        raise UsageError("--layers needs two depths or more: a line is drawn through them")
    rows = []
    with (
        terminate_as_interrupt(),
        Reporter() as reporter,
        tempfile.TemporaryDirectory() as folder,
    ):
        for model in args.models:
            rows.append(_measure(Path(model), args.text, args, Path(folder), reporter))
        for shape in args.shapes:
            rows += _shape(shape, args, Path(folder), reporter)
    windows = {"samples": args.samples, "seq_len": args.seq_len, "kv_ratio": RATIO}
    record = {**collect_provenance(), **windows, "rows": [asdict(row) for row in rows]}
    write_json(args.output, record)
    write_text(args.output.with_suffix(".md"), markdown(rows, args.samples, args.seq_len))
    return 0


def extrapolate(rows: Sequence[PredictionRow], layers: int) -> tuple[float, int]:
    """Seconds and peak bytes at another depth: by the line through the first and the last row."""
    first, last = rows[0], rows[-1]
    share = (layers - first.layers) / (last.layers - first.layers)
    seconds = first.seconds + share * (last.seconds - first.seconds)
    return round(seconds, 1), round(first.peak_bytes + share * (last.peak_bytes - first.peak_bytes))


def markdown(rows: Sequence[PredictionRow], samples: int, length: int) -> str:
    """The table."""
    from vllm_eigen.benchmarks.lib.markdown import table

    lines = [
        "# What a calibration takes, and what was foretold",
        "",
        f"The whole command at KV ratio {RATIO}, {samples} windows of {length} tokens, against "
        "`calibrate --dry-run` just before. Shapes are random models with the sizes of the model "
        "of that name; their last row is extrapolated by a line in layers, not run.",
        "",
    ]
    lines += table(
        ("model", "layers", "", "seconds", "foretold", "ratio", "peak, MiB", "foretold", "ratio"),
        [
            (
                row.model,
                row.layers,
                "run" if row.measured else "extrapolated",
                f"{row.seconds:.0f}",
                f"{row.foretold_seconds:.0f}",
                f"{row.foretold_seconds / row.seconds:.2f}",
                f"{row.peak_bytes / 2**20:.0f}",
                f"{row.foretold_peak_bytes / 2**20:.0f}",
                f"{row.foretold_peak_bytes / row.peak_bytes:.2f}",
            )
            for row in rows
        ],
        right_from=3,
    )
    return "\n".join(lines) + "\n"


def _shape(
    name: str, args: argparse.Namespace, folder: Path, reporter: Reporter
) -> Iterator[PredictionRow]:
    """Rows of random models with few layers, and of the whole one."""
    import json
    import shutil
    from dataclasses import replace

    from vllm_eigen.benchmarks.calibration.random_model import save_model, words

    config = SHAPES[name]
    text = folder / "words.txt"
    text.write_text(words(4 * args.samples * args.seq_len), encoding="utf-8")
    rows = []
    for layers in args.layers:
        model = folder / f"{name}-{layers}"
        save_model(model, {**config, "num_hidden_layers": layers})
        row = _measure(model, [str(text)], args, folder, reporter)
        shutil.rmtree(model)
        rows.append(replace(row, model=name))
    whole = folder / name
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = _foretell(whole, args, folder)
    seconds, peak = extrapolate(rows, config["num_hidden_layers"])
    yield from rows
    yield PredictionRow(
        name, config["num_hidden_layers"], False, seconds, round(found.seconds, 1), peak,
        found.peak_memory_bytes,
    )  # fmt: skip


def _measure(
    model: Path, text: Sequence[str], args: argparse.Namespace, folder: Path, reporter: Reporter
) -> PredictionRow:
    from vllm_eigen.benchmarks.calibration.child import calibrate

    found = _foretell(model, args, folder)
    options = ["--output", str(folder / "output"), "--overwrite", "--kv-ratio", str(RATIO)]
    options += ["--text", *text, "--samples", str(args.samples), "--seq-len", str(args.seq_len)]
    cost = calibrate(model, options, cache=folder / "cache", timeout=TIMEOUT_SECONDS)
    row = PredictionRow(
        model.name, found.layers + found.kept_layers, True, cost.seconds,
        round(found.seconds, 1), cost.peak_bytes, found.peak_memory_bytes,
    )  # fmt: skip
    reporter.note(
        f"{row.model}: {row.seconds:.0f} s, foretold {row.foretold_seconds:.0f}; "
        f"{row.peak_bytes / 2**20:.0f} MiB, foretold {row.foretold_peak_bytes / 2**20:.0f}"
    )
    return row


def _foretell(model: Path, args: argparse.Namespace, folder: Path) -> Prediction:
    from vllm_eigen.calibration.model.text import Corpus
    from vllm_eigen.calibration.options import Options
    from vllm_eigen.calibration.predict import predict
    from vllm_eigen.calibration.target import Target

    def unread() -> Corpus:
        raise AssertionError("a prediction reads no text")

    return predict(
        Options(
            model=str(model),
            output=folder / "none",
            target=Target(RATIO),
            corpus=unread,
            provenance={},
            samples=args.samples,
            length=args.seq_len,
        )
    )
