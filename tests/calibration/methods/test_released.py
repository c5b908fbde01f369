# SPDX-License-Identifier: Apache-2.0
"""The authors' released variant: one key basis for all heads, from keys alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vllm_eigen.calibration.methods import get_method
from vllm_eigen.calibration.methods.base import Layer
from vllm_eigen.calibration.methods.basis import LayerBases
from vllm_eigen.calibration.statistics.batch import Batch
from vllm_eigen.calibration.statistics.statistic import Accumulator
from vllm_eigen.checkpoint.families import Geometry
from vllm_eigen.checkpoint.modes import KeyMode

GEOMETRY = Geometry(1, 4, 2, 5, 12)


def _bases(name: str, key_mode: Any) -> tuple[LayerBases, Batch]:
    generator = torch.Generator().manual_seed(3)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(2, 20, heads, 5, generator=generator)

    batch = Batch(query=normal(4), key=normal(2), value=normal(2), context=normal(4))
    method = get_method(name)
    accumulator = Accumulator(method.statistics(key_mode), GEOMETRY)
    accumulator.add(batch)
    return method.bases(Layer(0, GEOMETRY, accumulator.moments(), key_mode)), batch


def test_all_heads_share_the_singular_vectors_of_all_keys() -> None:
    bases, batch = _bases("released", KeyMode.PRE_ROPE)
    torch.testing.assert_close(bases.key.encoder[0], bases.key.encoder[1])
    keys = batch.key.reshape(-1, 5).double().numpy()
    singular = np.linalg.svd(keys, compute_uv=False)
    for rank in range(1, 5):
        encoder, decoder = (part[0].numpy() for part in bases.key.at(rank))
        lost = ((keys - keys @ encoder @ decoder) ** 2).sum()
        assert lost == pytest.approx((singular[rank:] ** 2).sum())


def test_values_and_folded_keys_are_as_published() -> None:
    for key_mode in (KeyMode.PRE_ROPE, KeyMode.NO_ROPE):
        released, _ = _bases("released", key_mode)
        paper, _ = _bases("paper", key_mode)
        torch.testing.assert_close(released.value.energy, paper.value.energy)
        assert torch.equal(released.value.encoder, paper.value.encoder)
        assert torch.equal(released.key.energy, paper.key.energy) == (key_mode is KeyMode.NO_ROPE)
