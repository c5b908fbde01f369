# SPDX-License-Identifier: Apache-2.0
"""The instructions that make numbers of codes and of fp8, for every 16 bits that there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.gpu.interpreter.ptx import evaluate

pytest.importorskip("triton")
from vllm_eigen.kernels.gpu.coded.codes import unpacking
from vllm_eigen.kernels.gpu.plain import latents

UNITS = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "plane"), [(n, p) for n in (4, 2) for p in range(16 // n)])
def test_every_code_becomes_its_number(dtype: torch.dtype, bits: int, plane: int) -> None:
    asm = unpacking(plane, bits, dtype == torch.float16)
    found = evaluate(asm, UNITS.view(np.uint32)).view(np.int16)
    numbers = torch.from_numpy(found).view(dtype).double().numpy()
    if bits == 4:
        expected = ((UNITS >> 4 * plane & 15) - 7.5) * 16 ** (plane % 2)
    else:
        expected = (UNITS >> 2 * plane & 3) - 1.5
    np.testing.assert_array_equal(numbers, expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("plane", [0, 1])
def test_every_fp8_number_becomes_float16(dtype: torch.dtype, plane: int) -> None:
    """NaN and infinities as well."""
    asm = latents.unpacking(plane, dtype == torch.float8_e5m2)
    found = evaluate(asm, UNITS.view(np.uint32)).view(np.float16)
    expected = torch.from_numpy(UNITS.view(np.uint8)).view(dtype).half().numpy()[plane::2]
    np.testing.assert_array_equal(found, expected)


def test_two_numbers_take_three_instructions() -> None:
    """Constants are moved once for all."""
    instructions = [line.split()[0] for line in unpacking(3, 4, False).split(";")[3:-1]]
    assert instructions == ["shr.b32", "lop3.b32", "fma.rn.bf16x2"]


def test_an_unknown_instruction_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="popc"):
        evaluate("{ popc.b32 $0, $1; }", np.zeros(2, np.uint32))
