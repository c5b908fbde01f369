# SPDX-License-Identifier: Apache-2.0
"""The committed capacity table is what the command writes, and one row is right by hand."""

from __future__ import annotations

from pathlib import Path

from vllm_eigen import cli
from vllm_eigen.benchmarks.serving import capacity

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "capacity.md"


def test_the_committed_table_is_current(tmp_path: Path) -> None:
    assert cli.main(["bench", "capacity", "--output", str(tmp_path / "capacity.md")]) == 0
    assert (tmp_path / "capacity.md").read_text() == DOCUMENT.read_text()


def test_a_row_by_hand() -> None:
    config, _ = capacity.MODELS["Llama-3.1-8B"]
    weights = 2 * 8_030_261_248  # parameters on its model card
    room = 0.92 * 81559 * 2**20 - 2 * 2**30 - weights
    token = 2 * 32 * 8 * 128  # elements: keys and values, layers, KV heads, head size
    assert capacity.users(config, capacity.LARGE, None, "bfloat16") == int(
        room / (2 * token * 8192)
    )
    assert capacity.users(config, capacity.LARGE, None, "fp8") == int(room / (token * 8192))


def test_more_compression_and_more_memory_never_hold_fewer() -> None:
    for config, devices in capacity.MODELS.values():
        for device in devices:
            counts = [
                capacity.users(config, device, ratio, "bfloat16") for ratio in capacity.RATIOS
            ]
            assert counts == sorted(counts)
        row = [capacity.users(config, device, 0.6, "fp8") for device in capacity.SINGLE]
        assert row == sorted(row)


def test_an_unwritable_place_is_one_line(capsys) -> None:  # type: ignore[no-untyped-def]
    assert cli.main(["bench", "capacity", "--output", "/dev/null/capacity.md"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
