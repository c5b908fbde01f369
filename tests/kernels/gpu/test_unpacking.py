# SPDX-License-Identifier: Apache-2.0
"""The instructions that make numbers of codes, evaluated for every unit that there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.gpu.interpreter.ptx import evaluate

pytest.importorskip("triton")
from vllm_eigen.kernels.gpu.coded.codes import unpacking

UNITS = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("planes", "plane"), [(n, p) for n in (4, 8) for p in range(n)])
def test_every_code_becomes_its_number(dtype: torch.dtype, planes: int, plane: int) -> None:
    asm = unpacking(plane, planes, dtype == torch.float16)
    found = evaluate(asm, UNITS.view(np.uint32)).view(np.int16)
    numbers = torch.from_numpy(found).view(dtype).double().numpy()
    if planes == 4:
        expected = ((UNITS >> 4 * plane & 15) - 7.5) * 16 ** (plane % 2)
    else:
        expected = (UNITS >> 2 * plane & 3) - 1.5
    np.testing.assert_array_equal(numbers, expected)


def test_two_numbers_take_three_instructions() -> None:
    """Constants are moved once for all."""
    instructions = [line.split()[0] for line in unpacking(3, 4, False).split(";")[3:-1]]
    assert instructions == ["shr.b32", "lop3.b32", "fma.rn.bf16x2"]


def test_an_unknown_instruction_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="popc"):
        evaluate("{ popc.b32 $0, $1; }", np.zeros(2, np.uint32))
