# SPDX-License-Identifier: Apache-2.0
"""Tables and plot of one run of `bench gpu`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from vllm_eigen.benchmarks.lib.markdown import table
from vllm_eigen.benchmarks.lib.results import write_json, write_text

Row = dict[str, Any]


def is_right(result: Row) -> bool:
    """Whether nothing that was run is wrong; what was not run is not."""
    wrong = [row for row in result.get("correctness", []) if not _agrees(row)]
    errors = result.get("sanitizer", {}).get("errors")
    return not wrong and not errors and "failed" not in result.get("engine", {})


def tables(result: Row) -> list[str]:
    """Lines of Markdown."""
    made = result["provenance"]
    lines = [f"# The Triton kernels on {made['device']['name']}", ""]
    lines += [f"Commit {made['commit']}, {made['date']}."]
    if "correctness" in result:
        lines += ["", "## Against float64", "", *_correctness(result["correctness"])]
    if "timing" in result:
        lines += ["", "## Milliseconds a call", ""]
        if result["copy_gbs"]:
            lines += [f"Copying on the device: {result['copy_gbs']:.0f} GB/s.", ""]
        lines += _timing(result["timing"], result["copy_gbs"])
    if "sanitizer" in result:
        lines += ["", "## compute-sanitizer", "", _sanitizer(result["sanitizer"])]
    if "engine" in result:
        lines += ["", "## vLLM's engine", "", *_engine(result["engine"])]
    if result["left_out"]:
        lines += ["", "## Left out", "", *(f"- {one}" for one in result["left_out"])]
    return lines


def write(path: Path, result: Row) -> None:
    """The JSON, and beside it the table and, with matplotlib, the plot."""
    write_json(path, result)
    write_text(path.with_suffix(".md"), "\n".join(tables(result)) + "\n")
    written = [path.name, path.with_suffix(".md").name]
    if not result.get("timing"):
        print("no plot: nothing was timed")
    elif importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        plot(result["timing"], path.with_suffix(".png"))
        written.append(path.with_suffix(".png").name)
    print(f"wrote {', '.join(written)}")


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up over the fastest baseline, one bar a point."""
    from vllm_eigen.benchmarks.lib import plots

    found = [(row, *fastest(row["milliseconds"])) for row in rows]
    found = [one for one in found if one[1] is not None]
    figure, axes = plots.pyplot().subplots(figsize=(9, 1 + 0.28 * len(rows)))
    names = [f"{what(row)}, {row['phase']} {row['batch']} x {row['context']}" for row, *_ in found]
    axes.barh(names, [ms / row["milliseconds"]["eigen"] for row, _, ms in found])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the fastest baseline")
    figure.tight_layout()
    plots.save(figure, path)


def fastest(milliseconds: dict[str, float]) -> tuple[str | None, float]:
    """The fastest baseline over full heads, and its time; None where there is none."""
    others = {
        name: taken
        for name, taken in milliseconds.items()
        if name not in ("eigen", "triton_attn_diffkv")
    }
    if not others:
        return None, 0.0
    name = min(others, key=lambda one: others[one])
    return name, others[name]


def _agrees(row: Row) -> bool:
    return bool(row["agrees"]) and row.get("replays", True)


def _correctness(rows: list[Row]) -> list[str]:
    headings = ["cache", "heads", "step", "relative error", "graph replay", ""]
    return table(
        headings,
        [
            [
                what(row),
                f"{row['heads']}/{row['kv_heads']} of {row['head_size']}",
                row["phase"],
                f"{row['relative_error']:.1e}",
                {True: "equal", False: "differs", None: "-"}[row.get("replays")],
                "" if _agrees(row) else "WRONG",
            ]
            for row in rows
        ],
        right_from=3,
    )


def _timing(rows: list[Row], copy_gbs: float | None) -> list[str]:
    headings = ["cache", "heads", "step", "Eigen", "DIFFKV", "fastest full", "", "x", "GB/s"]
    headings += ["of copy", "error"]
    cells = []
    for row in rows:
        taken = row["milliseconds"]
        name, baseline = fastest(taken)
        diffkv = taken.get("triton_attn_diffkv")
        cells.append(
            [
                what(row),
                f"{row['heads']}/{row['kv_heads']}",
                f"{row['phase']} {row['batch']} x {row['context']}",
                f"{taken['eigen']:.3f}",
                "-" if diffkv is None else f"{diffkv:.3f}",
                "-" if name is None else f"{baseline:.3f}",
                name or "-",
                "-" if name is None else f"{baseline / taken['eigen']:.2f}",
                f"{row['gbs']:.0f}",
                "-" if copy_gbs is None else f"{100 * row['gbs'] / copy_gbs:.0f} %",
                f"{row['relative_error']:.1e}",
            ]
        )
    missing = {name: why for row in rows for name, why in row["missing"].items()}
    notes = [f"- {name}: {why}" for name, why in missing.items() if name != "triton_attn_diffkv"]
    return table(headings, cells, right_from=3) + (["", "Baselines missing:", *notes] * bool(notes))


def _sanitizer(found: Row) -> str:
    if "skipped" in found:
        return f"Not run: {found['skipped']}."
    return f"Errors: {found['errors']}."


def _engine(found: Row) -> list[str]:
    if "skipped" in found:
        return [f"Not run: {found['skipped']}."]
    if "failed" in found:
        return [f"Failed: {found['failed']}.", "", "```", *found["report"], "```"]
    from vllm_eigen.benchmarks.engine.decode_report import from_json, markdown

    return markdown(*from_json(found)).splitlines()[2:]


def what(row: Row) -> str:
    """The cache in words."""
    kind = {16: "bf16", 8: "fp8"}.get(row["bits"], f"{row['bits']} bits")
    return f"{kind} {row['ranks'][0]}/{row['ranks'][1]}, {row['key_mode']}"
