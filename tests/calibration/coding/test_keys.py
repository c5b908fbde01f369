# SPDX-License-Identifier: Apache-2.0
"""Codes of keys: what the maps and steps do through the kernels' rounding, and what is foretold."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_eigen.calibration.coding import keys
from vllm_eigen.calibration.coding.keys import KeyCodes, fit_keys
from vllm_eigen.checkpoint.codes import WIDTHS, Code
from vllm_eigen.kernels.coding import decode, encode

SIZES = st.sampled_from([4, 8, 12, 20, 32, 64])


def samples(
    size: int, seed: int = 0, *, heads: int = 2, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and gradients [6, 20, heads, size], each correlated in its own way."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    spread = torch.logspace(0, -2, size)
    found = [
        torch.einsum(
            "wthd,hde->wthe", normal(6, 20, heads, size) * spread, normal(heads, size, size)
        )
        for _ in range(2)
    ]
    return found[0] + offset * normal(heads, size), found[1]


def codes(size: int) -> list[Code]:
    """Codes of all shapes that fit."""
    given_codes = [
        Code(eight=4),
        Code(eight=size),
        Code(eight=4, four=(size - 4) // 8 * 8),
        Code(four=size // 8 * 8) if size >= 8 else Code(eight=4),
        Code(four=16, two=(size - 16) // 16 * 16) if size >= 20 else Code(eight=4),
    ]
    return [code for code in given_codes if code.rank <= size]


@settings(max_examples=25, deadline=None)
@given(size=SIZES, seed=st.integers(0, 99), offset=st.sampled_from([0.0, 5.0]))
def test_decoders_invert_encoders(size: int, seed: int, offset: float) -> None:
    fit = fit_keys(*samples(size, seed, offset=offset))
    assert fit.encoder.dtype == torch.float64
    unit = torch.eye(size, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(fit.encoder @ fit.decoder, unit, rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(size=SIZES, seed=st.integers(0, 99), data=st.data())
def test_levels_are_whole_steps_from_the_offset(size: int, seed: int, data: st.DataObject) -> None:
    """Steps -2^(b-1) to 2^(b-1) - 1 of each direction, the nearest; dropped directions are 0."""
    fit = fit_keys(*samples(size, seed, offset=3.0))
    code = data.draw(st.sampled_from(codes(size)))
    assume(fit.copies(code) == 1)
    generator = torch.Generator().manual_seed(seed)
    half = torch.tensor([2 ** (width - 1) for width in code.widths], dtype=torch.float64)
    levels = (torch.randn(50, 2, code.rank, generator=generator).double() * half).round()
    between = 0.8 * torch.rand(levels.shape, generator=generator).double() - 0.4
    rows = torch.tensor([WIDTHS.index(width) for width in code.widths])
    steps = fit.steps[rows, :, torch.arange(code.rank)].T
    rest = torch.randn(50, 2, size - code.rank, generator=generator).double()
    latents = torch.cat([(levels + between) * steps, rest], -1)
    key = torch.einsum("thr,hrd->thd", latents, fit.decoder) + fit.offset
    nearest = torch.maximum(torch.minimum(levels, half - 1), -half) * steps
    expected = torch.einsum("thr,hrd->thd", nearest, fit.decoder[:, : code.rank]) + fit.offset

    (encoder, decoder), offset = fit.maps(code)
    coded = torch.einsum("thd,hdr->thr", key - offset, encoder)
    read = decode(*encode(coded, code), code).double()
    found = torch.einsum("thr,hrd->thd", read, decoder) + offset
    assert float((found - expected).abs().max()) < 1e-9 * float(key.abs().max())


@settings(max_examples=25, deadline=None)
@given(size=SIZES, seed=st.integers(0, 99), offset=st.sampled_from([0.0, 5.0]))
def test_choices_grow_and_lose_less(size: int, seed: int, offset: float) -> None:
    fit = fit_keys(*samples(size, seed, offset=offset))
    choices = fit.choices()
    assert choices[0].code.num_bytes == 4
    for one, other in pairwise(choices):
        assert one.code.num_bytes < other.code.num_bytes
        assert other.loss < one.loss
    assert all(item.loss == pytest.approx(fit.loss(item.code)) for item in choices)
    assert all(item.code.rank <= size and not item.code.token_scale for item in choices)


def measured(fit: KeyCodes, code: Code, key: torch.Tensor) -> torch.Tensor:
    """Error of coded keys [windows, length, heads, size]."""
    (encoder, decoder), offset = fit.maps(code)
    coded = torch.einsum("wthd,hdr->wthr", key - offset, encoder)
    read = decode(*encode(coded, code), code).double()
    return torch.einsum("wthr,hrd->wthd", read, decoder) + offset - key


def test_the_foretold_loss_is_that_of_the_kernels_rounding() -> None:
    """Directions are foretold alone; all at once they lose about the sum."""
    key, gradient = samples(32)
    fit = fit_keys(key, gradient)
    for code in (Code(eight=32), Code(four=32), Code(eight=4, four=8, two=16)):
        error = measured(fit, code, key.double()) * gradient.double()
        alone = error.sum(-1).square().sum()
        together = error.sum((1, 2, 3)).square().sum()
        found = float((alone + together) / 2 / (2 * 6 * 20))
        assert found == pytest.approx(fit.loss(code), rel=0.5)


@pytest.mark.parametrize("bits", [Code(eight=32), Code(eight=12, four=8)])
def test_a_direction_worth_more_than_8_bits_is_stored_several_times(
    bits: Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for attention to the token before, in models with learned positions."""
    generator = torch.Generator().manual_seed(0)
    key, gradient = samples(32, heads=1)
    axis = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    # Along the axis keys and gradients are large; across it they are as before.
    along = 300 * torch.rand(6, 20, 1, 1, generator=generator) - 150
    key = key - (key @ axis)[..., None] * axis + along * axis
    gradient = gradient + 1000 * torch.randn(6, 20, 1, 1, generator=generator) * axis

    def loss(fit: KeyCodes) -> float:
        error = measured(fit, bits, key.double()) * gradient.double()
        return float(error.sum(-1).square().sum() / (2 * 6 * 20))

    fit = fit_keys(key, gradient)
    assert fit.copies(bits) == 8
    assert loss(fit) == pytest.approx(fit.loss(bits), rel=0.5)
    several = loss(fit)
    monkeypatch.setattr(keys, "COPIES", (1,))
    assert several < loss(fit) / 4


def test_a_large_common_offset_is_taken_off() -> None:
    key, gradient = samples(32)
    common = 30 * torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    fit = fit_keys(key + common, gradient)
    weights = gradient.square().sum(-1, keepdim=True)
    mean = ((key + common) * weights).sum((0, 1)) / weights.sum((0, 1))
    torch.testing.assert_close(fit.offset, mean.double(), rtol=1e-5, atol=1e-5)
    # With the offset nothing of it is left to code: as good as keys without one, about.
    plain = fit_keys(key, gradient)
    assert fit.loss(Code(four=32)) < 1.5 * plain.loss(Code(four=32))


@pytest.mark.parametrize("size", [4, 8, 32])
def test_keys_and_gradients_of_zero_have_codes(size: int) -> None:
    nothing = torch.zeros(2, 5, 2, size)
    for pair in ((nothing, nothing), (nothing, nothing + 1), (nothing + 1, nothing)):
        fit = fit_keys(*pair)
        assert fit.choices()
        for tensor in (fit.encoder, fit.decoder, fit.steps, fit.losses):
            assert bool(tensor.isfinite().all())
        for item in fit.choices():
            assert item.loss == pytest.approx(0.0, abs=1e-9)
