# SPDX-License-Identifier: Apache-2.0
"""Every further family on two tensor-parallel ranks and through torch's compiler, for a table.

`python -m tests.plugin.harness.families --output FILE.json`: the suite has a few of these rows,
since all of them take minutes. Engines run in processes of their own: vLLM wraps classes of
transformers there, and the references need them as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.plugin.harness import two_ranks
from tests.plugin.harness.engine import Answer, ask, engine, expected_logits, relative_error
from tests.plugin.harness.rows import FAMILY_ROWS, MAX_MODEL_LEN, Served
from tests.plugin.harness.two_ranks import TOKENS, TwoRanks, word_prompts
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.common.provenance import collect

REFUSED = {"olmo2": "refused: its norm of all heads together is not split"}
"""Families that do not run on two ranks."""
SECONDS = 3000
LENGTHS = (1, 40, 100)
COLUMNS = {"two_ranks": "TP = 2", "compiled": "compiled"}


def main() -> None:
    """Run all rows, and write JSON with a table beside it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)
    two_ranks.SECONDS = SECONDS
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        served = {}
        for row in FAMILY_ROWS:
            (folder / str(row)).mkdir()
            served[str(row)] = row.write(folder / str(row))
        found: dict[str, dict[str, float | str]] = {name: {} for name in served}
        split = {str(row): served[str(row)] for row in FAMILY_ROWS if row.kind not in REFUSED}
        ranks = TwoRanks.run(split, folder)
        compiled = _compiled(served, folder)
        for row in FAMILY_ROWS:
            name = str(row)
            model = load_reference(served[name].eigen)
            found[name]["compiled"] = _worst(model, *compiled[name])
            found[name]["two_ranks"] = (
                _worst(model, *ranks.answers(name)) if name in split else REFUSED[row.kind]
            )
    record = collect(["python", "-m", "tests.plugin.harness.families", *sys.argv[1:]])
    text = json.dumps({"rows": found, "provenance": record}, indent=2)
    output.write_text(text + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(table(found, record), encoding="utf-8")


def table(found: Mapping[str, Mapping[str, float | str]], record: Mapping[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        "# Families on two ranks and compiled",
        "",
        "Largest relative error of vLLM's logits, whole vocabulary, against transformers with the "
        "same compressed weights; tiny random models, coded latents, float32, kernels of the "
        f"machine. `{record['command']}`, {record['date'][:10]}, commit {record['commit']}, "
        f"{record['cpu']}.",
        "",
        "| family | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in found.items():
        cells = [row[column] for column in COLUMNS]
        shown = [cell if isinstance(cell, str) else f"{cell:.1e}" for cell in cells]
        lines.append(f"| {name.removesuffix('-coded')} | {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def _worst(model: Any, asked: list[list[int]], answers: list[Answer]) -> float:
    """The largest error of all prompts."""
    return max(
        relative_error(answer.logits, expected_logits(model, prompt, answer.tokens))
        for prompt, answer in zip(asked, answers, strict=True)
    )


def _compiled(
    models: Mapping[str, Served], folder: Path
) -> dict[str, tuple[list[list[int]], list[Answer]]]:
    """Prompts and answers of each model through torch's compiler."""
    import torch.multiprocessing as processes

    context = processes.start_processes(
        _compile, args=(dict(models), folder), nprocs=1, join=False, start_method="spawn"
    )
    try:
        context.join(timeout=SECONDS)
    finally:
        for process in context.processes:
            process.kill()
    asked = word_prompts(LENGTHS, seed=9)
    return {
        name: (asked, torch.load(folder / f"{name}.compiled", weights_only=False))
        for name in models
    }


def _compile(_: int, models: dict[str, Served], folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, served in models.items():
        with engine(
            served.model, max_model_len=MAX_MODEL_LEN, enforce_eager=False, **served.options
        ) as llm:
            answers = ask(llm, word_prompts(LENGTHS, seed=9), TOKENS, logits=True)
        torch.save(answers, folder / f"{name}.compiled")


if __name__ == "__main__":
    main()
