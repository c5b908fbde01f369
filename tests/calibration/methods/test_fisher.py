# SPDX-License-Identifier: Apache-2.0
"""`--method fisher`: foretold losses are those of the samples, ranks come from them alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.calibration.coding.loss import total_loss
from vllm_eigen.calibration.methods.fisher import fisher_basis, foretold_losses
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.checkpoint.validate import validate

Command = Callable[..., tuple[int, str, str]]
SMALL = ("--method", "fisher", "--samples", 12, "--seq-len", 24)


def samples(windows: int, length: int, heads: int, size: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = windows, length, heads, size
    mix = torch.randn(size, size, generator=generator)
    return [torch.randn(shape, generator=generator) @ mix for _ in range(2)]


@settings(max_examples=20, deadline=None)
@given(
    windows=st.integers(1, 4),
    length=st.integers(1, 9),
    heads=st.integers(1, 3),
    size=st.integers(2, 8),
    seed=st.integers(0, 99),
)
def test_foretold_losses_are_those_of_the_errors(
    windows: int, length: int, heads: int, size: int, seed: int
) -> None:
    x, gradient = samples(windows, length, heads, size, seed)
    basis = fisher_basis(x, gradient)
    wide = torch.einsum("hij,hjk->hik", basis.encoder, basis.decoder)
    torch.testing.assert_close(wide, torch.eye(size).double().expand_as(wide), atol=1e-6, rtol=0)
    found = foretold_losses(basis, x, gradient)
    assert found.shape == (size + 1,)
    assert found[size] == 0
    plain = []
    for rank in range(size):
        maps = basis.encoder[:, :, :rank] @ basis.decoder[:, :rank]
        error = torch.einsum("wthd,hde->wthe", x.double(), maps) - x.double()
        plain.append(total_loss(error, gradient.double()))
    # A larger rank never costs more.
    expected = np.maximum.accumulate(np.array(plain)[::-1])[::-1]
    np.testing.assert_allclose(found[:size].numpy(), expected, rtol=1e-5, atol=1e-12)


def test_a_direction_without_gradient_goes_first() -> None:
    generator = torch.Generator().manual_seed(5)
    x, gradient = (torch.randn(6, 40, 1, 6, generator=generator) for _ in range(2))
    gradient[..., 2] = 0
    x[..., 2] *= 3
    basis = fisher_basis(x, gradient)
    error = x.double() @ (basis.encoder[0, :, :5] @ basis.decoder[0, :5]) - x.double()
    share = error.square().mean((0, 1, 2))
    # Directions that the loss does not ask for are left out, however large.
    assert share[2] > 0.9 * share.sum()


@pytest.mark.parametrize("mode", [KeyMode.PRE_ROPE, KeyMode.POST_ROPE])
def test_the_command(
    mode: KeyMode,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(*_: Any) -> Any:
        raise AssertionError("no rank is tried")

    monkeypatch.setattr("vllm_eigen.calibration.calibrator.loss_curves", measured)
    base = make_model("llama", head_dim=32, hidden_size=48)
    arguments = ("calibrate", base, "--text", text_file, *SMALL, "--key-cache", mode)
    status, _, error = command(*arguments, "--output", tmp_path / "out", "--kv-ratio", 0.6)
    assert status == 0, error
    eigen = validate(tmp_path / "out")
    assert (eigen.method, eigen.key_mode, eigen.coded) == ("fisher", mode, False)
    assert eigen.kv_ratio == pytest.approx(0.6, abs=0.01)
    record = eigen.provenance["calibration"]
    assert (record["rank_rule"], record["refit"]) == ("foretold", True)
    assert len({(layer.rank_k, layer.rank_v) for layer in eigen.layers}) == len(eigen.layers)
