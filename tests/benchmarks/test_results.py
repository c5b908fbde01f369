# SPDX-License-Identifier: Apache-2.0
"""Committed tables are what the commands make of the committed results, and the command itself."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from vllm_eigen import cli
from vllm_eigen.benchmarks import command

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MADE = [
    ("engine-decode", "engine/engine-decode"),
    ("engine-decode", "engine/engine-decode-triangular"),
    ("gpu-model", "kernels/gpu/gpu-model-h100"),
    ("overheads", "engine/overheads"),
    ("serve", "serving/serve-demo"),
    ("serve", "serving/serve-llama-mix"),
    ("serve", "serving/serve-llama-mix-short"),
]


@pytest.mark.parametrize(("benchmark", "name"), MADE)
def test_committed_tables_are_current(benchmark: str, name: str, tmp_path: Path) -> None:
    result = shutil.copy(RESULTS / f"{name}.json", tmp_path)
    assert cli.main(["bench", benchmark, "--from", str(result)]) == 0
    for kind in ("md", "csv"):
        committed = RESULTS / f"{name}.{kind}"
        if committed.exists():
            assert (tmp_path / committed.name).read_bytes() == committed.read_bytes()


@pytest.mark.parametrize("benchmark", ["engine-decode", "gpu-model", "overheads", "serve"])
def test_a_damaged_result_is_one_line(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    for content in ("no JSON", "[]", '{"rows": [{}]}'):
        path.write_text(content, encoding="utf-8")
        assert cli.main(["bench", benchmark, "--from", str(path)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_every_benchmark_has_help() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for name in command.BENCHMARKS:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([name, "--help"])
        assert ended.value.code == 0
