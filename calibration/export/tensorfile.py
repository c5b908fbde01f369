# SPDX-License-Identifier: Apache-2.0
"""Write a safetensors file one tensor at a time, so that writing needs no more memory than that.

The library's own writer wants all tensors at once. The format allows a header padded with spaces,
so its space is reserved first and written when all tensors are known.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ENTRY = 160
"""Bytes of the header that one tensor takes at most, besides its name."""


class TensorFile:
    """A safetensors file being written. A context manager.

    Args:
        path: the file to make.
        names: every tensor that may come; sets the size of the header.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        size = 64 + sum(_ENTRY + len(name) for name in names)
        self._header_size = (size + 7) // 8 * 8
        self._header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._file = path.open("wb")
        self._file.write(b"\0" * (8 + self._header_size))
        self.size = 0
        """Bytes of tensors written."""

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                header = json.dumps(self._header, separators=(",", ":")).encode()
                self._file.seek(0)
                self._file.write(
                    self._header_size.to_bytes(8, "little") + header.ljust(self._header_size)
                )

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor.

        Raises:
            OSError: the disk refuses.
        """
        tensor = tensor.detach().cpu().contiguous()
        self._header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + tensor.nbytes],
        }
        raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        self._file.write(raw)
        self.size += tensor.nbytes
