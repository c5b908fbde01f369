# SPDX-License-Identifier: Apache-2.0
"""The tensors in a folder's safetensors files: shapes from the headers, contents only where asked.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from vllm_eigen.common.errors import CheckpointError

_EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""A floating-point type's bits as integers, and those of its exponent: all set means not finite."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def is_finite(self) -> bool:
        """Whether every element is a finite number; reads the tensor.

        numpy has no bfloat16, so bits are looked at.
        """
        if self.dtype not in _EXPONENTS:
            return False
        integer, exponent = _EXPONENTS[self.dtype]
        with self.path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(header_size))[self.name]["data_offsets"]
            file.seek(8 + header_size + begin)
            bits = np.frombuffer(file.read(end - begin), integer)
        return not bool(np.any((bits & exponent) == exponent))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name, from the files of its index or from all there are.

    Raises:
        CheckpointError: there is no file, or one is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from error
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file; calibrate again")
    found: dict[str, StoredTensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    part = tensors.get_slice(name)
                    shape = tuple(part.get_shape())
                    found[name] = StoredTensor(path, name, shape, str(part.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is missing or damaged ({error}); calibrate again or copy it again"
            ) from error
    return found
