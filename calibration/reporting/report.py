# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen report`: a page about one checkpoint, or about several of the same base model.

The plots show what calibration and fine-tuning recorded in the checkpoints, and a sweep if one was
measured (`sweep`).
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_eigen.calibration.export.write import DETAILS_FILE
from vllm_eigen.calibration.reporting import plots
from vllm_eigen.calibration.reporting.sweep import SweepPoint
from vllm_eigen.checkpoint.config import EigenConfig
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import CheckpointError
from vllm_eigen.common.files import atomic_directory

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { text-align: right; padding: .25rem .75rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
@media (prefers-color-scheme: dark) {
  body { color: #e8e8e8; background: #16181c } img { background: #fff; border-radius: 4px }
  th, td { border-color: #444 } }
"""


@dataclass(frozen=True)
class _Checkpoint:
    name: str
    eigen: EigenConfig
    details: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What was measured for a report.

    Attributes:
        ratios, samples: points of the two sweeps, empty where not asked for.
        about: one line on text and conditions.
        provenance: record of the process.
    """

    ratios: Sequence[SweepPoint]
    samples: Sequence[SweepPoint]
    about: str
    provenance: dict[str, Any]


def write_report(
    folders: Sequence[Path],
    output: Path,
    *,
    measured: Measured | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `index.html` and its PNG files to `output`; returns the page.

    A sweep's points go to `sweep.json` beside it.

    Raises:
        CheckpointError: a folder is no checkpoint, or they are of different base models.
        OutputError: `output` exists or cannot be written.
    """
    checkpoints = read_checkpoints(folders)
    with atomic_directory(output, overwrite=overwrite) as work:
        body = [_summary(checkpoints)]
        points = _points(checkpoints)
        if len(points) > 1:
            plots.quality(work / "quality.png", points)
            body.append(_figure("quality.png", "Perplexity increase against KV bytes"))
        if measured is not None:
            body += _sweep(work, measured)
        for number, item in enumerate(checkpoints):
            body += _section(work, number, item)
        title = f"{_base(checkpoints[0])}: low-rank KV cache"
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
            '</title><meta name="viewport" content="width=device-width">'
            f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(body)}</html>\n"
        )
        (work / "index.html").write_text(page, encoding="utf-8")
    return output / "index.html"


def read_checkpoints(folders: Sequence[Path]) -> list[_Checkpoint]:
    """The checkpoints of a report.

    Raises:
        CheckpointError: a folder is no checkpoint, or they are of different base models.
    """
    checkpoints = [_read(folder) for folder in folders]
    bases = {item.eigen.provenance.get("base", {}).get("fingerprint") for item in checkpoints}
    if len(bases) > 1:
        raise CheckpointError("the checkpoints are of different base models; report on one at once")
    return checkpoints


def _read(folder: Path) -> _Checkpoint:
    eigen = validate(folder)
    try:
        details = json.loads((folder / DETAILS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        details = {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / DETAILS_FILE} is damaged: {error}") from error
    return _Checkpoint(folder.resolve().name, eigen, details)


def _section(work: Path, number: int, item: _Checkpoint) -> list[str]:
    eigen, details = item.eigen, item.details
    title = f"{item.name}: {eigen.method} at {eigen.kv_ratio:.3f}"
    parts = [f"<h2>{html.escape(title)}</h2>"]
    plots.ranks(work / f"ranks-{number}.png", eigen)
    parts.append(_figure(f"ranks-{number}.png", "Ranks by layer"))
    if details.get("spectrum"):
        plots.spectrum(work / f"spectrum-{number}.png", details["spectrum"])
        parts.append(_figure(f"spectrum-{number}.png", "Spectra of keys and values"))
    if details.get("loss_curves"):
        full = eigen.head_size * eigen.head_group
        plots.losses(work / f"losses-{number}.png", details["loss_curves"], full)
        caption = "Loss of the model's output when one layer alone is compressed"
        parts.append(_figure(f"losses-{number}.png", caption))
    finetune = eigen.provenance.get("finetune") or {}
    if finetune.get("losses"):
        plots.finetuning(work / f"finetune-{number}.png", finetune["losses"])
        parts.append(_figure(f"finetune-{number}.png", "Perplexity against fine-tuning steps"))
        parts.append(f"<p>On windows held out of {html.escape(str(finetune.get('text', '')))}.</p>")
    command = eigen.provenance.get("command", "")
    parts.append(f"<p>Made by <code>{html.escape(str(command))}</code>.</p>")
    return parts


def _summary(checkpoints: Sequence[_Checkpoint]) -> str:
    head = "checkpoint|method|KV ratio|base perplexity|perplexity|increase|top-1|KL a token"
    rows = []
    for item in checkpoints:
        found = item.eigen.provenance.get("measured") or {}
        cells = [item.name, item.eigen.method, f"{item.eigen.kv_ratio:.4f}"]
        if found:
            increase = found["eigen_perplexity"] / found["base_perplexity"] - 1
            cells += [f"{found['base_perplexity']:.4f}", f"{found['eigen_perplexity']:.4f}"]
            cells += [f"{increase:+.2%}", f"{found['top1_agreement']:.4f}"]
            cells += [f"{found['kl_per_token']:.5f}"]
        else:
            cells += ["-"] * 5
        rows.append(cells)
    return (
        f"{_rows(head, rows)}<p>Measured at calibration on held-out windows "
        "of its text, offline in transformers' layers, float32.</p>"
    )


def _sweep(work: Path, measured: Measured) -> list[str]:
    parts = []
    if measured.ratios:
        plots.bytes_curve(work / "bytes.png", measured.ratios)
        parts += [_figure("bytes.png", "Perplexity against KV bytes"), _table(measured.ratios)]
    if measured.samples:
        plots.samples_curve(work / "samples.png", measured.samples)
        caption = "Perplexity against calibration windows"
        parts += [_figure("samples.png", caption), _table(measured.samples)]
    record: dict[str, Any] = {"about": measured.about, "provenance": measured.provenance}
    for name in ("ratios", "samples"):
        record[name] = [asdict(point) for point in getattr(measured, name)]
    (work / "sweep.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return [*parts, f"<p>{html.escape(measured.about)}</p>"]


def _table(points: Sequence[SweepPoint]) -> str:
    rows = [
        [
            f"{point.kv_ratio:.3f}",
            "fp8" if point.fp8 else "16 bits",
            f"{point.bytes_ratio:.3f}",
            str(point.samples),
            f"{point.quality.eigen_perplexity:.4f}",
            f"{point.increase:+.2%}",
            f"{point.quality.top1_agreement:.4f}",
            f"{point.quality.kl_per_token:.5f}",
        ]
        for point in points
    ]
    return _rows("KV ratio|cache|KV bytes|windows|perplexity|increase|top-1|KL a token", rows)


def _rows(head: str, rows: Sequence[Sequence[str]]) -> str:
    """A table; `head` has its titles with bars between."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    titles = "".join(f"<th>{name}</th>" for name in head.split("|"))
    return f"<table><tr>{titles}</tr>{table}</table>"


def _points(checkpoints: Sequence[_Checkpoint]) -> list[plots.CheckpointPoint]:
    points = []
    for item in checkpoints:
        found = item.eigen.provenance.get("measured")
        if found:
            increase = found["eigen_perplexity"] / found["base_perplexity"] - 1
            group = item.eigen.head_group
            label = item.eigen.method + (f", groups of {group}" if group > 1 else "")
            points.append(plots.CheckpointPoint(label, item.eigen.kv_ratio, increase))
    return points


def _figure(file: str, caption: str) -> str:
    text = html.escape(caption)
    return f'<h3>{text}</h3><img src="{file}" alt="{text}">'


def _base(item: _Checkpoint) -> str:
    return str(item.eigen.provenance.get("base", {}).get("name", "model"))
