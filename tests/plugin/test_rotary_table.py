# SPDX-License-Identifier: Apache-2.0
"""Scaled RoPE tables of vLLM have frequencies, too, so that decode absorbs their slow pairs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0, "max_trained_positions": 512},
    "dynamic, longer": {"factor": 2.0, "max_trained_positions": 256},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_the_angles_of_the_table(kind: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_eigen.plugin.vllm_api import rotary_table

    parameters = {"rope_type": kind.split(",")[0], "rope_theta": 1e4, **KINDS[kind]}
    with set_current_vllm_config(VllmConfig()):
        table = rotary_table(get_rope(64, 512, rope_parameters=parameters, dtype=torch.bfloat16))
    assert table.frequencies is not None
    frequencies = torch.tensor(table.frequencies, dtype=torch.float64)
    angles = torch.arange(table.max_position)[:, None] * frequencies
    size = table.cos_sin[0, 0]
    expected = size * torch.cat([angles.cos(), angles.sin()], dim=1)
    np.testing.assert_allclose(table.cos_sin, expected, atol=2e-4)


@pytest.mark.parametrize("max_model_len", [64, 65])
def test_longrope_has_the_table_that_is_served(
    max_model_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the original length of 64 the short factors, beyond it the long ones for all."""
    from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope as module

    from vllm_eigen.plugin.vllm_api import rotary_table, rotate_query

    served = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
    monkeypatch.setattr(module, "get_current_vllm_config", lambda: served)
    factors = [1.0 + 0.1 * pair for pair in range(4)], [2.0 + pair for pair in range(4)]
    rotary = module.Phi3LongRoPEScaledRotaryEmbedding(
        10, 8, 256, 64, 1e4, True, torch.float32, *factors
    )
    table = rotary_table(rotary)
    assert (table.max_position, table.rotary_dim) == ((256, 8) if max_model_len > 64 else (64, 8))
    query = torch.randn(3, 2 * 10, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 5, 63])
    cos, sin = (part[:, None] for part in table.cos_sin[positions].chunk(2, dim=-1))
    first, second, rest = query.view(3, 2, 10).split([4, 4, 2], dim=-1)
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    torch.testing.assert_close(rotate_query(rotary, positions, query), expected.flatten(1))
