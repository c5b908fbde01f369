"""Models of the engine benchmark, and how it counts a decode's speed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.engine_decode import MODELS, Model, Row, decode_speed, markdown, plot, write_models
from vllm_eigen.checkpoint import parse_config

ARGS = argparse.Namespace(
    hidden=2048, layers=1, contexts=[64, 128], batch=2, threads=1, dtype="float32"
)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_models_are_what_the_table_says(model: Model, tmp_path: Path) -> None:
    base, eigen = write_models(model, ARGS, tmp_path)
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (base, eigen))
    section = parse_config(other)
    assert one["num_attention_heads"] == section.num_heads == 16
    assert section.num_kv_heads == model.kv_heads
    assert section.key_mode == model.key_mode
    assert section.elements_per_token == model.kv_heads * (model.rank_k + model.rank_v)
    assert model.kv_ratio == pytest.approx((model.rank_k + model.rank_v) / 256)


class Engine:
    """Gives request i its first token at 5 + i, and its last at 15 + i."""

    def generate(self, inputs: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
        return [
            SimpleNamespace(metrics=SimpleNamespace(first_token_ts=5 + i, last_token_ts=15 + i))
            for i, _ in enumerate(inputs)
        ]


def test_the_prompt_does_not_count() -> None:
    pytest.importorskip("vllm")
    assert decode_speed(Engine(), [[5], [6], [7]], tokens=9) == pytest.approx(3 * 8 / 10)


def test_table_and_plot(tmp_path: Path) -> None:
    row = Row("opt", 16, 16, "folded", 77, 77, 0.6, 128, 4, 100.0, 150.0, 1.5, 1.4, 1.6)
    line = "| opt | 16 / 16 | folded | 77, 77 | 0.60 | 128 | 100.0 | 150.0 | 1.50 (1.40 to 1.60) |"
    assert line in markdown([row], ARGS)
    plot(tmp_path / "plot.png", [row])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
