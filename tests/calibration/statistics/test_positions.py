# SPDX-License-Identifier: Apache-2.0
"""Moments over shifted windows against windows that are shifted one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.calibration.job import Job, Recipe
from vllm_eigen.calibration.layer_pass import run_layers
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.model.transformers_model import load_base
from vllm_eigen.calibration.state import State
from vllm_eigen.calibration.statistics.positions import Shifts
from vllm_eigen.calibration.statistics.rotary import Rotation, rotate
from vllm_eigen.calibration.statistics.samples import LayerSamples, cached_samples
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.common.progress import Reporter


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    pairs=st.integers(0, 3),
    rest=st.integers(0, 3),
    last=st.integers(0, 50),
    stacked=st.booleans(),
    interleaved=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_mean_is_that_of_the_rotated_vectors(
    heads: int, pairs: int, rest: int, last: int, stacked: bool, interleaved: bool, seed: int
) -> None:
    size = max(1, 2 * pairs + rest)
    generator = torch.Generator().manual_seed(seed)
    # One pair of each kind that a closed form may stumble over: equal, zero and fast frequencies.
    frequencies = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)[:pairs]
    vectors = torch.randn(7, 1, heads, size, generator=generator, dtype=torch.float64)

    def moment(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(2)[:, 0] if stacked else x[:, 0].transpose(0, 1)
        return rows.mT @ rows

    expected = torch.zeros_like(moment(vectors))
    for shift in range(last + 1):
        angles = (shift * frequencies)[None, None]
        rotation = Rotation(angles.cos(), angles.sin(), interleaved)
        expected += moment(rotate(vectors, rotation)) / (last + 1)
    found = Shifts(frequencies, last, interleaved).mean(moment(vectors), size)
    torch.testing.assert_close(found, expected)


def test_post_rope_bases_know_every_position_a_window_may_begin_at(
    make_model: Callable[..., Path],
) -> None:
    """Reference: the keys that transformers caches when the windows begin at each position."""
    length, last = 6, 32 - 6
    source = open_source(str(make_model("llama", max_position_embeddings=32)))
    tokens = torch.randint(3, 60, (4, length), generator=torch.Generator().manual_seed(0))
    model = LayerwiseModel(source, torch.device("cpu"), eager=False)
    recipe = Recipe.resolve(source, "released", key_mode=KeyMode.POST_ROPE)
    job = Job(model, recipe, tokens, State(), Reporter(quiet=True))
    found = run_layers(job, None)
    reference = load_base(source)
    moments = torch.zeros(2, 8, 8, dtype=torch.float64)
    for shift in range(last + 1):
        places = torch.arange(shift, shift + length).expand(len(tokens), -1)
        cache = reference(tokens, position_ids=places, use_cache=True).past_key_values
        for moment, layer in zip(moments, cache.layers, strict=True):
            rows = layer.keys.detach().double().flatten(0, 2)
            moment += rows.mT @ rows / len(rows) / (last + 1)
    for layer_result, moment in zip(found, moments, strict=True):
        energy = layer_result.bases.key.energy[0]
        expected = torch.linalg.eigvalsh(moment).flip(0)
        torch.testing.assert_close(energy, expected, rtol=1e-4, atol=1e-5)


def test_samples_of_rotated_keys_stand_at_every_position() -> None:
    """Reference: the closed form over all shifts; a few windows must come close to it."""
    windows, length, positions = 2, 3000, 4096
    generator = torch.Generator().manual_seed(0)
    key, slope = torch.randn(2, 1, 1, 1, 8, generator=generator)
    samples = LayerSamples(
        *(item.expand(windows, length, 1, 8) for item in (key, key, slope, slope)),
        rotation=Rotation(torch.ones(1, length, 4), torch.zeros(1, length, 4)),
    )
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.0])
    cached = cached_samples(samples, KeyMode.POST_ROPE, frequencies, positions)
    shifts = Shifts(frequencies.double(), positions - length)
    for found, vector in ((cached.key, key), (cached.key_gradient, slope)):
        assert torch.equal(found[:, 0], vector[:, 0].expand(windows, 1, 8))  # attention sinks stay
        rows = found[:, 1:].flatten(0, 2).double()
        row = vector.flatten()[None].double()
        expected = shifts.mean(row.T @ row, 8)
        assert (rows.T @ rows / len(rows) - expected).norm() < 0.05 * expected.norm()
    torch.testing.assert_close(
        (cached.key * cached.key_gradient).sum(-1), (samples.key * samples.key_gradient).sum(-1)
    )
    assert cached_samples(samples, KeyMode.PRE_ROPE, frequencies, positions).key is samples.key


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 4096),
        ({"rope_type": "yarn", "original_max_position_embeddings": 1024, "factor": 4.0}, 4096),
        ({"rope_type": "longrope", "original_max_position_embeddings": 1024}, 1024),
        ({"type": "dynamic", "factor": 2.0}, 4096),
    ],
)
def test_shifts_end_where_the_frequencies_change(
    scaling: dict[str, Any] | None, expected: int, make_model: Callable[..., Path]
) -> None:
    source = open_source(str(make_model("llama")))
    config = {"max_position_embeddings": 4096, "rope_scaling": scaling}
    assert replace(source, config=config).rotary_positions == expected
