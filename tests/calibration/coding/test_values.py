# SPDX-License-Identifier: Apache-2.0
"""Codes of values: which there are, their maps, and tokens of very different size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.calibration.coding.values import codes_of, fit_values
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.common.errors import UsageError
from vllm_eigen.kernels.coding import decode, encode


def samples(size: int, seed: int = 0, *, heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of unequal directions, and gradients, [6, 20, heads, size]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(6, 20, heads, size, generator=generator)
    mixed = torch.randn(heads, size, size, generator=generator)
    value = torch.einsum("wthd,hde->wthe", noise * torch.logspace(0, -1, size), mixed)
    return value, torch.randn(6, 20, heads, size, generator=generator)


@pytest.mark.parametrize("size", range(4, 257, 4))
def test_codes_cover_every_direction(size: int) -> None:
    codes = codes_of(size)
    assert all(code.rank == size and code.token_scale for code in codes)
    assert len(set(codes)) == len(codes)
    sizes = [code.num_bytes for code in codes]
    assert sizes == sorted(sizes)
    assert min(sizes) <= size // 4 * (3 if size < 24 else 2) + 6, "no small code"


@pytest.mark.parametrize("size", [1, 2, 3, 6, 30, 63])
def test_other_head_sizes_are_refused(size: int) -> None:
    with pytest.raises(UsageError, match="multiple of 4"):
        codes_of(size)


@settings(max_examples=25, deadline=None)
@given(size=st.sampled_from([4, 8, 12, 20, 32, 64]), seed=st.integers(0, 99), data=st.data())
def test_maps_are_orthogonal_but_for_their_steps(size: int, seed: int, data: st.DataObject) -> None:
    fit = fit_values(*samples(size, seed))
    code = data.draw(st.sampled_from(codes_of(size)))
    encoder, decoder = fit.maps(code)
    unit = torch.eye(size, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(encoder @ decoder, unit, rtol=0, atol=1e-9)
    steps = decoder.norm(dim=-1)
    columns = encoder * steps[:, None]
    torch.testing.assert_close(columns.mT @ columns, unit, rtol=0, atol=1e-9)
    torch.testing.assert_close(decoder / steps[:, :, None], columns.mT, rtol=0, atol=1e-9)


def coded(
    value: torch.Tensor, fit_maps: tuple[torch.Tensor, torch.Tensor], code: Code
) -> torch.Tensor:
    encoder, decoder = fit_maps
    latents = torch.einsum("wthd,hdr->wthr", value.double(), encoder)
    read = decode(*encode(latents, code), code).double()
    return torch.einsum("wthr,hrd->wthd", read, decoder)


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
@pytest.mark.parametrize("size", [16, 64])
def test_small_tokens_keep_their_direction(size: int, scale: float) -> None:
    """The first token, an attention sink: its values are much smaller than the others."""
    value, gradient = samples(size)
    value[:, 0] *= scale
    gradient[:, 0] *= 30
    fit = fit_values(value, gradient)
    for code in codes_of(size):
        if code.two:
            continue
        error = (coded(value, fit.maps(code), code) - value).norm(dim=-1)
        relative = error / value.norm(dim=-1)
        assert float(relative[:, 0].max()) < 0.25
        assert float(relative.mean()) < 0.15


@settings(max_examples=15, deadline=None)
@given(size=st.sampled_from([16, 32, 64]), seed=st.integers(0, 99))
def test_choices_have_the_loss_of_the_kernels_rounding(size: int, seed: int) -> None:
    value, gradient = samples(size, seed)
    fit = fit_values(value, gradient)
    assert [item.code for item in fit.choices] == codes_of(size)
    for item in fit.choices:
        error = coded(value, fit.maps(item.code), item.code) - value
        moved = (error * gradient).sum(-1)
        expected = (moved.square().sum() + moved.sum((1, 2)).square().sum()) / 4 / (6 * 20)
        assert item.loss == pytest.approx(float(expected), rel=0.15)
    widest = next(item.loss for item in fit.choices if item.code.eight == size)
    assert widest == min(item.loss for item in fit.choices)


def test_values_of_zero_have_codes() -> None:
    nothing = torch.zeros(2, 5, 2, 32)
    for pair in ((nothing, nothing), (nothing, nothing + 1), (nothing + 1, nothing)):
        fit = fit_values(*pair)
        for item in fit.choices:
            assert item.loss == pytest.approx(0.0, abs=1e-4)
            for tensor in fit.maps(item.code):
                assert bool(tensor.isfinite().all())
