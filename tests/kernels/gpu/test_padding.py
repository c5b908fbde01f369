# SPDX-License-Identifier: Apache-2.0
"""A model of many ranks compiles few kernels, and pads no more than that takes."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.gpu.specializations import recorded
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels import (
    DownProjection,
    KeyReconstruction,
    Latents,
    LayerSpec,
    Limits,
    RotaryTable,
    ScoreOptions,
)

pytest.importorskip("triton")

from vllm_eigen.kernels.gpu.padding import (
    NUM_PADDINGS,
    Padding,
    compiled_sizes,
    padding_of,
    shared_paddings,
)

HEADS, KV_HEADS, MOST_KERNELS = 32, 8, 6
LIMITS = Limits(256, 131_072, torch.device("cpu"))
RANKS = {64: range(8, 65, 8), 128: range(16, 129, 8), 256: range(32, 257, 16)}
interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def _numbers(head_size: int) -> list[Latents]:
    """32 layers of 30 pairs of ranks."""
    pairs = Random(0).sample(list(product(RANKS[head_size], repeat=2)), 30)
    return [Latents(*pair) for pair in [*pairs, *pairs[:2]]]


def _codes(head_size: int) -> list[Latents]:
    """32 layers of 30 pairs of codes, whose ranks differ too."""
    steps = range(head_size // 32 + 1)
    codes = [
        Code(eight=4 * a, four=8 * (head_size // 16 - a - b), two=16 * b, token_scale=True)
        for a, b in product(steps, steps)
        if a + b < head_size // 16
    ]
    choice = Random(0)
    pairs = [(one, two) for one, two in product(codes, repeat=2) if one.rank != two.rank]
    pairs = choice.sample(pairs, min(len(pairs), 30)) or [(codes[0], codes[0])]
    found = [Latents(key.rank, value.rank, key, value) for key, value in pairs]
    return [*found, *found[:2]]


def _layer(latents: Latents, head_size: int, peers: list[Latents], mode: str) -> LayerSpec:
    dtype = torch.bfloat16
    spec = LayerSpec(
        *(HEADS, KV_HEADS, latents.rank_k, latents.rank_v, dtype),
        torch.uint8 if latents.key_code else dtype,
        ScoreOptions(0.1),
        key_code=latents.key_code,
        value_code=latents.value_code,
        peers=tuple(peers),
    )
    if mode == "reconstructed":
        rotary = RotaryTable.from_frequencies(torch.rand(head_size // 2), 256)
        basis = torch.zeros(KV_HEADS, latents.rank_k, head_size, dtype=dtype)
        return replace(spec, reconstruction=KeyReconstruction(basis, rotary))
    if mode == "projected":
        bases = [
            torch.zeros(KV_HEADS, head_size, rank, dtype=dtype)
            for rank in (latents.rank_k, latents.rank_v)
        ]
        return replace(spec, down_projection=DownProjection(*bases))
    return spec


@pytest.mark.skipif(interpreted, reason="the interpreter specialises nothing")
@pytest.mark.parametrize("head_size", RANKS)
@pytest.mark.parametrize("mode", ["folded", "reconstructed", "projected"])
@pytest.mark.parametrize("coded", [False, True], ids=("numbers", "codes"))
def test_30_pairs_of_ranks_compile_6_kernels(coded: bool, mode: str, head_size: int) -> None:
    from vllm_eigen.kernels.gpu.kernels import GpuKernels

    peers = _codes(head_size) if coded else _numbers(head_size)
    assert len(peers) == 32
    assert len({(one.rank_k, one.rank_v, one.key_code, one.value_code) for one in peers}) == 30
    with recorded() as compiled:
        kernels = GpuKernels()
        specs = [_layer(latents, head_size, peers, mode) for latents in peers]
        layers = [kernels.prepare(spec) for spec in specs]
        kernels.reserve(LIMITS, layers)
        kernels.warm_up(LIMITS, layers, 64)
        assert len(compiled) <= MOST_KERNELS, sorted(name for name, _ in compiled)
        # Each layer alone, as the test would not see if peers meant nothing.
        compiled.clear()
        alone = [kernels.prepare(replace(spec, peers=())) for spec in specs]
        kernels.warm_up(LIMITS, alone, 64)
        assert len(compiled) > MOST_KERNELS


_PADDINGS = st.builds(
    Padding,
    *[st.sampled_from([16, 32, 48, 64, 80, 96, 128])] * 2,
    *[st.sampled_from([0, 16, 32])] * 2,
)


@settings(deadline=None, derandomize=True)
@given(st.lists(_PADDINGS, min_size=1, max_size=40))
def test_shared_paddings_cover_and_save(paddings: list[Padding]) -> None:
    shared = shared_paddings(tuple(paddings))
    assert 1 <= len(shared) <= NUM_PADDINGS
    least = [min(one.numbers for one in shared if one.covers(own)) for own in paddings]
    widest = max(shared, key=lambda one: one.numbers)
    assert all(widest.covers(own) for own in paddings)
    # No other choice beside the widest saves more.
    for other in paddings:
        choice = [other.numbers if other.covers(own) else widest.numbers for own in paddings]
        assert sum(least) <= sum(choice)


def test_a_layer_alone_is_padded_for_itself() -> None:
    spec = _layer(Latents(72, 40), 128, [], "folded")
    sizes = compiled_sizes(spec)
    assert sizes.padding == sizes.widest == padding_of(spec.latents) == Padding(80, 48)
    assert (sizes.rank, sizes.unit) == (72, 8)


@pytest.mark.parametrize(("ranks", "planes"), [((72, 40), 2), ((72, 41), 1)])
def test_fp8_is_read_in_pairs_where_every_row_begins_on_two(
    ranks: tuple[int, int], planes: int
) -> None:
    spec = replace(_layer(Latents(*ranks), 128, [], "folded"), cache_dtype=torch.uint8)
    sizes = compiled_sizes(spec)
    assert sizes.planes == planes
    # A product takes 16 of each of two planes.
    assert sizes.padding == (Padding(96, 64) if planes == 2 else Padding(80, 48))


def test_one_odd_rank_makes_all_loads_narrow() -> None:
    spec = _layer(Latents(72, 40), 128, [Latents(77, 40)], "folded")
    assert compiled_sizes(spec).unit == 1
    assert compiled_sizes(replace(spec, peers=(Latents(64, 12),))).unit == 4
