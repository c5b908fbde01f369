# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels over coded caches against float64: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case, layer_of, make
from tests.kernels.gpu.moving import (
    HAS_GPU,
    RUNS_HERE,
    SETTINGS,
    Moving,
    alone_as_in_company,
    close,
    needs_kernels,
    run_interpreted,
    with_nan,
)
from tests.kernels.strategies import cases, codes
from tests.kernels.test_coding import latents
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels import Latents, LayerSpec, ScoreOptions
from vllm_eigen.kernels.coding import encode

pytest.importorskip("triton")

from vllm_eigen.kernels.gpu.coded.layer import key_tiles, value_tiles

LARGE = (Code(eight=256), Code(four=168), Code(eight=36, four=136), Code(two=256), Code(eight=132))
"""Codes whose rows fill more than one tile, or tiles of many planes."""
PLACES = ("query", "key", "value")
"""Where a NaN is put. On a GPU with both kinds of keys each; interpreted, with one."""


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
@pytest.mark.slow
def test_without_a_gpu() -> None:
    run_interpreted(__file__)


def shorter(case: Case) -> Case:
    """The case, as short as shows two splits and a prompt to the interpreter."""
    if HAS_GPU:
        return case
    sequences = tuple((old % 90, (new - 1) % 12 + 1) for old, new in case.sequences[:2])
    return dataclasses.replace(case, sequences=sequences)


@needs_kernels
# The interpreter takes many seconds for each.
@settings(SETTINGS, max_examples=200 if HAS_GPU else 4)
@given(case=cases(coded=True), index=st.integers(0, 3))
def test_agrees_with_float64(case: Case, index: int) -> None:
    if case.dtype == torch.float32 and max(case.rank_k, case.head_size) > 100:
        # Their bases may fill no GPU's shared memory, and are then refused.
        case = dataclasses.replace(case, dtype=torch.bfloat16)
    close(shorter(case), Moving(index))


@needs_kernels
@pytest.mark.parametrize(
    ("code", "reconstruct"),
    # On a GPU all; interpreted, each code once, and both kinds of keys.
    list(product(LARGE, (False, True)))
    if HAS_GPU
    else [(code, index % 2 == 0) for index, code in enumerate(LARGE)],
    ids=str,
)
def test_codes_of_many_rows(code: Code, reconstruct: bool) -> None:
    scaled = code.eight + code.four > 0
    value = code.model_copy(update={"token_scale": scaled})
    case = Case(
        queries_per_head=3,
        rank_k=code.rank,
        rank_v=code.rank,
        block_size=64,
        sequences=((60, 1), (3, 5)),
        dtype=torch.bfloat16,
        head_size=32,
        reconstruct=reconstruct,
        rotary_dim=16,
        codes=(code, value),
    )
    close(case, Moving(1))


def unpacked(part: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes `[tokens, rank]` and scales `[tokens]` of one head's keys or values of a block.

    part: uint8, unit after unit, as `vllm_eigen.kernels.gpu.coded.layout` says.
    """
    tokens = part.shape[0] // code.num_bytes
    units = part[: tokens * code.code_bytes].view(torch.int16).view(-1, tokens).int()
    found, first = [], 0
    for width, count in code.counts():
        size = count * width // 16
        some = units[first : first + size]
        found += [((some >> shift) & (2**width - 1)).byte() for shift in range(0, 16, width)]
        first += size
    scale = None
    if code.token_scale:
        scale = part[tokens * code.code_bytes :].view(torch.bfloat16).float()
    return torch.cat(found).t(), scale


@needs_kernels
@pytest.mark.parametrize(
    ("queries_per_head", "reconstruct", "window"),
    list(product((1, 4, 8), (False, True), (None, 50)))
    if HAS_GPU
    else [(1, False, None), (4, True, 50), (8, False, 50)],
)
def test_decodes_up_to_16_queries(
    queries_per_head: int, reconstruct: bool, window: int | None
) -> None:
    """In splits of 64 keys, of which some queries of a sequence see fewer; 17 are a prompt."""
    code = Code(eight=4, four=24, token_scale=True)
    case = Case(
        num_kv_heads=1,
        queries_per_head=queries_per_head,
        rank_k=code.rank,
        rank_v=code.rank,
        sequences=((108, 16), (60, 7), (70, 1), (3, 17)),
        reconstruct=reconstruct,
        window=window,
        codes=(code, code),
    )
    close(case, Moving(1, hints=True))


@needs_kernels
@pytest.mark.parametrize("shared_bytes", [None, 48_000])
def test_heads_of_256(shared_bytes: int | None) -> None:
    """Their keys are reconstructed in four chunks of columns, whose bases fit at once or not."""
    code = Code(four=16, token_scale=True)
    case = Case(
        num_kv_heads=1,
        queries_per_head=2,
        rank_k=code.rank,
        rank_v=code.rank,
        sequences=((70, 1), (3, 12)),
        dtype=torch.bfloat16,
        head_size=256,
        reconstruct=True,
        rotary_dim=256,
        rope_base=10_000.0,
        codes=(code, code),
    )
    kernels = Moving(1, shared_bytes=shared_bytes)
    layer: Any = kernels.prepare(layer_of(make(case))).inner
    assert layer.decode.streams == (shared_bytes is not None)
    assert layer.prefill.streams
    close(case, kernels)


@needs_kernels
@pytest.mark.parametrize("reconstruct", [False, True])
def test_few_2_bit_codes_are_folded(reconstruct: bool) -> None:
    key, value = Code(eight=4, four=8, two=32), Code(four=8, two=16, token_scale=True)
    case = Case(
        num_kv_heads=1,
        rank_k=key.rank,
        rank_v=value.rank,
        sequences=((40, 1), (3, 5)),
        reconstruct=reconstruct,
        codes=(key, value),
    )
    kernels = Moving(1)
    layer: Any = kernels.prepare(layer_of(make(case))).inner
    assert key_tiles(layer.sizes.padding)[-1].folds == 4
    assert value_tiles(layer.sizes.padding)[-1].folds == 4
    close(case, kernels)


@needs_kernels
@pytest.mark.parametrize("encoded_size", [0, 32])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_padded_for_wider_layers(reconstruct: bool, encoded_size: int) -> None:
    """Tiles of other layers' codes, of widths that this layer has none of, change no result."""
    key, value = Code(eight=4, four=16), Code(two=32)
    case = Case(
        queries_per_head=2,
        rank_k=key.rank,
        rank_v=value.rank,
        sequences=((60, 1), (3, 5)),
        reconstruct=reconstruct,
        encoded_size=encoded_size,
        codes=(key, value),
    )
    wide, narrow = Code(four=168, two=32), Code(eight=8, two=16)
    peers = (Latents(wide.rank, narrow.rank, wide, narrow), Latents(16, 200, Code(two=16), wide))
    close(case, Moving(1, peers=peers))


@needs_kernels
@SETTINGS
@given(
    of_key=codes(),
    of_value=codes(),
    seed=st.integers(0, 2**20),
    size=st.sampled_from([1e-30, 1e-3, 0.7, 40.0, 1e30]),
    block_size=st.sampled_from([16, 48, 64]),
)
def test_stores_the_codes_of_the_definition(
    of_key: Code, of_value: Code, seed: int, size: float, block_size: int
) -> None:
    """Bit for bit, and no byte of any other token."""
    spec = LayerSpec(
        *(2, 2, of_key.rank, of_value.rank, torch.float32, torch.uint8, ScoreOptions(1.0)),
        key_code=of_key,
        value_code=of_value,
    )
    key, value = latents(of_key, seed, size), latents(of_value, seed + 1, size)
    key[2, 1, 1] = value[0, 0, -1] = torch.nan
    key[0, 0, 0] = -torch.inf
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, block_size, spec.key_width + spec.value_width)
    before = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    slots = torch.randperm(3 * block_size, generator=generator)[:6]
    slots[4] = -1
    cache = before.clone()
    Moving().prepare(spec).write_cache(key, value, cache, slots)
    written = torch.zeros(3, block_size, dtype=torch.bool)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, token = divmod(slot, block_size)
        written[block, token] = True
        for head in range(2):
            split = spec.key_width * block_size
            parts = cache[block, head].flatten().split([split, cache[0, 0].numel() - split])
            for part, x, code in zip(parts, (key, value), (of_key, of_value), strict=True):
                wanted, scale = encode(x[row, head], code)
                found, found_scale = unpacked(part, code)
                assert torch.equal(found[token], wanted)
                if scale is not None and found_scale is not None:
                    torch.testing.assert_close(
                        found_scale[token], scale, rtol=0, atol=0, equal_nan=True
                    )
    rows = [
        torch.cat(
            [
                part[: block_size * code.code_bytes].view(-1, 2 * block_size)
                for part, code in zip(
                    block.flatten().split(
                        [spec.key_width * block_size, spec.value_width * block_size]
                    ),
                    (of_key, of_value),
                    strict=True,
                )
            ]
        )[:, ~written[index].repeat_interleave(2)]
        for index, both in enumerate(zip(before, cache, strict=True))
        for block in (both[0][1], both[1][1])
    ]
    assert all(torch.equal(*pair) for pair in zip(rows[::2], rows[1::2], strict=True))


@needs_kernels
@pytest.mark.parametrize("projects_values", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_down_projects_into_codes(projects_values: bool, biased: bool) -> None:
    """As the definition codes the float64 latents, but for those beside a step's edge."""
    of_key = Code(eight=4, four=24, two=16)
    of_value = Code(eight=8, four=32, token_scale=True, scale_floor=1.0)
    case = Case(
        rank_k=of_key.rank,
        rank_v=of_value.rank,
        sequences=((79, 1),),
        encoded_size=48,
        projects_values=projects_values,
        codes=(of_key, of_value),
    )
    problem = make(case)
    [(key, value)] = problem.written
    projection = problem.down_projection
    assert projection is not None
    keys, values = problem.keys[0], problem.values[0]
    if biased:
        key_bias, value_bias = torch.randn(2, of_key.rank), torch.randn(2, of_value.rank)
        keys = keys + key_bias
        projection = dataclasses.replace(projection, key_bias=key_bias)
        if projects_values:
            values = values + value_bias
            projection = dataclasses.replace(projection, value_bias=value_bias)
    spec = dataclasses.replace(layer_of(problem), down_projection=projection)
    cache = torch.zeros(5, 2, 16, spec.key_width + spec.value_width, dtype=torch.uint8)
    Moving().prepare(spec).write_cache(key, value, cache, torch.arange(80))
    for x, code, first in ((keys, of_key, 0), (values, of_value, spec.key_width * 16)):
        wanted, _ = encode(x, code)
        parts = cache[..., :].flatten(2)[:, :, first : first + code.num_bytes * 16]
        found = torch.stack(
            [torch.stack([unpacked(head, code)[0] for head in block], dim=1) for block in parts]
        ).flatten(0, 1)
        difference = (found.int() - wanted.int()).abs()
        assert int(difference.max()) <= 1
        assert float((difference > 0).float().mean()) < 1e-3


@needs_kernels
@pytest.mark.parametrize("reconstruct", [False, True] if HAS_GPU else [True])
def test_bounds_and_company_change_nothing(reconstruct: bool) -> None:
    """A sequence gets the same bits alone, in a mixed batch, and with bounds from the host."""
    code = Code(eight=4, four=24, two=16, token_scale=True)
    case = Case(
        queries_per_head=2,
        rank_k=code.rank,
        rank_v=code.rank,
        sequences=((70, 1), (0, 17), (66, 3)),
        reconstruct=reconstruct,
        rotary_dim=16,
        window=50,
        codes=(code, code),
    )
    alone_as_in_company(case)


@needs_kernels
@pytest.mark.parametrize(
    ("place", "reconstruct"),
    list(product(PLACES, (False, True)))
    if HAS_GPU
    else list(zip(PLACES, (False, True, False), strict=True)),
)
def test_nan_in_nan_out(place: str, reconstruct: bool) -> None:
    """A NaN of a token scale reaches the rows that attend to it; all others keep their bits."""
    code = Code(eight=4, four=24, two=16, token_scale=True)
    case = Case(
        rank_k=code.rank,
        rank_v=code.rank,
        sequences=((70, 1), (5, 17)),
        reconstruct=reconstruct,
        codes=(code, code),
    )
    found, clean, reached = with_nan(case, place)
    assert torch.equal(found.isnan().all(dim=2), reached)
    assert torch.equal(found[~reached], clean[~reached])
