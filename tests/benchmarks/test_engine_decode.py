# SPDX-License-Identifier: Apache-2.0
"""Models of the engine benchmark, and how it counts a decode's speed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_eigen import cli
from vllm_eigen.benchmarks.engine.decode import decode_speed
from vllm_eigen.benchmarks.engine.decode_models import MODELS, Model, Settings, write_models
from vllm_eigen.benchmarks.engine.decode_report import Row, from_json, to_json, write_tables
from vllm_eigen.checkpoint.config import parse_config
from vllm_eigen.checkpoint.modes import KeyMode

SETTINGS = Settings(
    layers=1, hidden=2048, dtype="float32", contexts=(64, 128), pairs=(9, 5), batch=2, tokens=8,
    threads=1, pool_mib=8,
)  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_models_are_what_the_table_says(model: Model, tmp_path: Path) -> None:
    base, eigen = write_models(model, SETTINGS, tmp_path)
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (base, eigen))
    section = parse_config(other)
    assert one["num_attention_heads"] == section.num_heads == 16
    assert section.num_kv_heads == model.kv_heads
    assert section.key_mode == model.key_mode
    assert section.bytes_per_token(1) == model.kv_heads * (model.rank_k + model.rank_v)
    assert model.kv_ratio == pytest.approx((model.rank_k + model.rank_v) / 256)


class Engine:
    """Gives request i its first token at 5 + i, and its last at 15 + i."""

    def generate(self, prompts: list[list[int]], **sampling: Any) -> list[Any]:
        return [
            SimpleNamespace(metrics=SimpleNamespace(first_token_ts=5 + i, last_token_ts=15 + i))
            for i, _ in enumerate(prompts)
        ]


def test_the_prompt_does_not_count() -> None:
    assert decode_speed(Engine(), [[5], [6], [7]], tokens=9) == pytest.approx(3 * 8 / 10)


def test_table_and_plot(tmp_path: Path) -> None:
    row = Row("opt", 16, 16, KeyMode.NO_ROPE, 77, 77, 0.6, 128, 4, 100.0, 150.0, 1.5, 1.4, 1.6)
    ends = "77, 77 | 0.60 | 128 | 5 | 100.0 | 150.0 | 1.50 (1.40 to 1.60) |"
    result = tmp_path / "result.json"
    text = write_tables(result, SETTINGS, [row])
    assert f"| opt | 16 / 16 | no-rope | {ends}" in text
    assert (tmp_path / "result.md").read_text(encoding="utf-8") == text
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def test_tables_are_made_again_from_the_result(tmp_path: Path) -> None:
    row = Row("opt", 16, 16, KeyMode.NO_ROPE, 77, 77, 0.6, 128, 4, 100.0, 150.0, 1.5, 1.4, 1.6)
    document = json.loads(json.dumps(to_json(SETTINGS, [row])))
    assert from_json(document)[1] == [row]
    result = tmp_path / "result.json"
    result.write_text(json.dumps(document), encoding="utf-8")
    assert cli.main(["bench", "engine-decode", "--from", str(result)]) == 0
    assert result.with_suffix(".md").is_file()
    result.write_text("{}", encoding="utf-8")
    assert cli.main(["bench", "engine-decode", "--from", str(result)]) == 1
    assert cli.main(["bench", "engine-decode"]) == 2
