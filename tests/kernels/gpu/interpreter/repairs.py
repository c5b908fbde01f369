# SPDX-License-Identifier: Apache-2.0
"""Corrections to Triton's interpreter (TRITON_INTERPRET=1), so that it computes what a GPU would.

Triton 3.9's interpreter multiplies bfloat16 operands by their bit patterns and loses the carry when
it rounds to a narrower type, and has no inline assembly, which `ptx.py` evaluates. Only tests run
kernels in the interpreter.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl

from tests.kernels.gpu.interpreter.ptx import evaluate

_TORCH_DTYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_NUMPY = {tl.bfloat16: np.uint16, tl.float16: np.float16, tl.int32: np.int32}
_BITS = {8: (np.uint8, torch.uint8), 16: (np.uint16, torch.int16), 32: (np.uint32, torch.int32)}


def repair_interpreter() -> None:
    """Replace two faulty functions of the interpreter, and add one; a second call does nothing."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "repaired_by_vllm_eigen", False):
        return
    convert, dot = interpreter._convert_float, builder.create_dot

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        """Bit patterns of `data`, of Triton type `source`, as nearest even values of `target`."""
        if source not in _TORCH_DTYPES or target not in _TORCH_DTYPES:
            return convert(data, source, target, rounding)
        source_bits, target_bits = (_BITS[t.primitive_bitwidth] for t in (source, target))
        bits = np.ascontiguousarray(data).view(source_bits[0]).copy()
        values = torch.from_numpy(bits).view(source_bits[1]).view(_TORCH_DTYPES[source])
        converted = values.to(_TORCH_DTYPES[target]).view(target_bits[1])
        return converted.numpy().view(target_bits[0]).reshape(np.shape(data))

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """A product of bfloat16 values; other types as before."""
        wide = [
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        ]
        return dot(self, *wide, *rest)

    def create_inline_asm(
        self: Any, asm: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int
    ) -> Any:
        """Code of one operand and one result, both of 32 bits: of one number, or two of 16 bits."""
        [operand], [result] = values, types
        assert is_pure
        assert constraints == "=r,r"
        data = np.ascontiguousarray(operand.data)
        assert pack * data.itemsize == 4
        found = evaluate(asm, data.reshape(-1).view(np.uint32))
        scalar = result.scalar
        found = found.view(_NUMPY[scalar]).reshape(data.shape)
        made = interpreter.TensorHandle(found, scalar)
        return SimpleNamespace(get_result=lambda _: made)

    interpreter._convert_float = convert_float
    builder.create_inline_asm = create_inline_asm
    builder.create_dot = create_dot
    builder.repaired_by_vllm_eigen = True
