# SPDX-License-Identifier: Apache-2.0
"""The few PTX instructions that the kernels have inline, on arrays: the interpreter has none.

Semantics are those of NVIDIA's PTX ISA. What is not known here is an error.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

Registers = dict[str, np.ndarray[Any, np.dtype[np.uint32]]]
_HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
_BYTES = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}


def evaluate(asm: str, operand: np.ndarray[Any, np.dtype[np.uint32]]) -> Any:
    """What `$0` is after the code, with `operand` as `$1`; both uint32, of any shape."""
    registers: Registers = {"$1": operand}
    for line in asm.strip("{} ").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, target, *sources = re.split(r"[\s,]+", line.strip())
        values = [
            registers[one] if one in registers else np.full_like(operand, int(one, 0))
            for one in sources
        ]
        registers[target] = _execute(name, values)
    return registers["$0"]


def _execute(name: str, values: list[Any]) -> Any:
    """One instruction."""
    match name.split("."):
        case ["mov", "b32"]:
            return values[0]
        case ["shl", "b32"]:
            return values[0] << values[1]
        case ["shr", "b32"]:
            return values[0] >> values[1]
        case ["and", "b32"]:
            return values[0] & values[1]
        case ["prmt", "b32"]:
            return _permute(*values)
        case ["cvt", "u16", "u32"]:
            return values[0] & 0xFFFF
        case ["cvt", "rn", "f16x2", bytes_] if bytes_ in _BYTES:
            return _widen(values[0], _BYTES[bytes_])
        case ["lop3", "b32"]:
            return _lop3(*values)
        case ["fma", "rn", halves] if halves in _HALVES:
            return _fma(values, _HALVES[halves])
    raise NotImplementedError(f"PTX instruction {name}")


def _permute(low: Any, high: Any, selector: Any) -> Any:
    """Four bytes of the eight that the selector's four digits name, without its sign mode."""
    found = np.zeros_like(low)
    for place in range(4):
        digit = selector >> 4 * place & 0xF
        if (digit > 7).any():
            raise NotImplementedError("prmt of signs")
        some = np.where(digit < 4, low, high) >> 8 * (digit & 3) & 0xFF
        found |= some << 8 * place
    return found


def _widen(bits: Any, dtype: torch.dtype) -> Any:
    """Two numbers of a byte each, in the lower 16 bits, as two of float16, exactly."""
    two = torch.from_numpy(bits.astype(np.uint16).reshape(-1).view(np.uint8)).view(dtype)
    return two.half().view(torch.int16).numpy().view(np.uint32).reshape(bits.shape)


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    """Bit by bit, entry 4 a + 2 b + c of a truth table."""
    found = np.zeros_like(a)
    for entry in range(8):
        parts = [x if entry >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0))]
        # All bits where the table has a one.
        found |= parts[0] & parts[1] & parts[2] & (0 - (table >> entry & 1))
    return found


def _fma(values: list[Any], dtype: torch.dtype) -> Any:
    """a * b + c of both halves, rounded once: products and sums of halves are exact in float64."""
    a, b, c = (
        torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(dtype).double()
        for x in values
    )
    return (a * b + c).to(dtype).view(torch.int16).numpy().view(np.uint32).reshape(values[0].shape)
