# SPDX-License-Identifier: Apache-2.0
"""Scaled RoPE tables of vLLM have frequencies, too, so that decode absorbs their slow pairs."""

from __future__ import annotations

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
