# SPDX-License-Identifier: Apache-2.0
"""Codes of latents against the float64 definition, and their bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case, layer_of, make
from tests.kernels.decoded import decoded
from tests.kernels.strategies import codes
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.coding import decode, encode, from_bytes, pack, to_bytes, unpack

SETTINGS = settings(deadline=None, max_examples=100, derandomize=True)


def latents(code: Code, seed: int, size: float) -> torch.Tensor:
    """Rows with ties between codes, zeros and numbers out of range among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 2, code.rank, generator=generator) * size
    x[1] = x[1].mul(2).round() / 2
    x[2] = 0.0
    x[3, 0] *= 1e4
    x[4, :, ::2] = 0.0
    # Scales on and right beside numbers of bfloat16.
    x[5, 0] = x[5, 0].bfloat16().float()
    x[5, 1] = x[5, 0].nextafter(torch.tensor(1e9))
    return x


@SETTINGS
@given(codes(), st.integers(0, 2**20), st.sampled_from([1e-30, 1e-3, 0.7, 3.0, 40.0, 1e30]))
def test_latents_become_what_the_definition_says(code: Code, seed: int, size: float) -> None:
    x = latents(code, seed, size)
    found = decode(*encode(x, code), code).double().numpy()
    np.testing.assert_array_equal(found, decoded(x.double().numpy(), code))
    assert torch.equal(from_bytes(to_bytes(x, code), code), decode(*encode(x, code), code))


@SETTINGS
@given(codes(), st.integers(0, 2**20))
def test_bytes_hold_every_code(code: Code, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    of_width = [
        torch.randint(0, 2**width, (3, 2, count), generator=generator)
        for width, count in code.counts()
    ]
    written = torch.cat(of_width, dim=-1).to(torch.uint8)
    scale = torch.rand(3, 2, generator=generator).bfloat16().float() if code.token_scale else None
    packed = pack(written, scale, code)
    assert packed.shape == (3, 2, code.num_bytes)
    read, read_scale = unpack(packed, code)
    assert torch.equal(read, written)
    assert (read_scale is None) == (scale is None)
    assert scale is None or torch.equal(read_scale, scale)


def test_order_of_bytes() -> None:
    code = Code(eight=4, four=8, two=16, token_scale=True, scale_floor=1.0)
    x = torch.zeros(code.rank)
    x[:4] = torch.tensor([1.0, -1.0, 127.0, -500.0])
    x[4], x[5], x[11] = 3.0, -7.0, 1.0
    x[12], x[13], x[15], x[27] = 1.0, -1.0, 1.0, -9.0
    expected = [129, 127, 255, 0, 0x1B, 0x88, 0x88, 0x98, 0b11100111, 0xAA, 0xAA, 0b00101010]
    codes_alone = to_bytes(x, code.model_copy(update={"token_scale": False}))
    assert codes_alone.tolist() == expected
    x[3] = -127.5
    assert to_bytes(x, code).tolist() == [*expected, 0x80, 0x3F]


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_a_nan_is_kept_where_there_is_a_scale(floor: float) -> None:
    x = torch.ones(2, 8)
    x[0, 3] = float("nan")
    scaled = Code(four=8, token_scale=True, scale_floor=floor)
    assert from_bytes(to_bytes(x, scaled), scaled).isnan().all(dim=-1).tolist() == [True, False]
    fixed = Code(four=8)
    expected = [1.5, 1.5, 1.5, 0.5, 1.5, 1.5, 1.5, 1.5]
    assert from_bytes(to_bytes(x, fixed), fixed)[0].tolist() == expected


def test_misfits_are_one_clear_error() -> None:
    code = Code(four=8)
    spec = layer_of(make(Case(codes=(code, code))))
    with pytest.raises(KernelError, match="both its keys and its values"):
        replace(spec, value_code=None)
    with pytest.raises(KernelError, match="16 and 8 directions do not fit ranks 8 and 8"):
        replace(spec, key_code=Code(four=16))
    with pytest.raises(KernelError, match=r"uint8, not torch\.bfloat16"):
        replace(spec, cache_dtype=torch.bfloat16)
