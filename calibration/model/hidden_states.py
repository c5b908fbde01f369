# SPDX-License-Identifier: Apache-2.0
"""The hidden states between all layers, kept from the forward for the backward pass.

A layer's graph is made again on the way back from what entered it, so this is all that grows with
the number of layers. It is on the device while it fits there, then in the host's memory, then in a
file; that is not memory-mapped, because mapped pages would count as resident memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch

from vllm_eigen.calibration.model.activations import reserved_file
from vllm_eigen.common.errors import OutputError


class HiddenStates:
    """Float32 tensors [num_windows, length, hidden_size], one a slot. A context manager, which
    frees all of them.

    Args:
        slots: how many there are.
        shape: of each.
        device: where they are used. On a GPU they may take half of the memory that is free.
        memory_limit: most bytes kept in the host's memory, in whole slots.
        folder: where the others' file is; the system's temporary folder if None.

    Raises:
        OutputError: the disk is too small.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, ...],
        device: torch.device,
        memory_limit: int,
        folder: Path | None,
    ) -> None:
        self._shape, self._device = shape, device
        self._window = 4 * shape[1] * shape[2]
        self._bytes = shape[0] * self._window
        free: int = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0
        self._on_device = min(slots, free // self._bytes)
        host = min(slots - self._on_device, max(0, memory_limit) // self._bytes)
        self._in_memory = self._on_device + host
        self._tensors: dict[int, torch.Tensor] = {}
        spilled = (slots - self._in_memory) * self._bytes
        self._file = -1
        if spilled:
            with reserved_file(folder, spilled) as (handle, _):
                self._file = os.dup(handle)

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tensors.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def put(self, slot: int, part: slice, states: torch.Tensor) -> None:
        """Keep the windows `part` of a slot.

        Raises:
            OutputError: the file cannot be written.
        """
        if slot < self._in_memory:
            self._tensor(slot)[part] = states
            return
        data = states.cpu().contiguous().view(-1).numpy().data.cast("B")
        start = self._offset(slot, part)
        while data:
            try:
                written = os.pwrite(self._file, data, start)
            except OSError as error:
                raise OutputError(
                    f"cannot write activations: {error.strerror}; free space and run again"
                ) from error
            data, start = data[written:], start + written

    def get(self, slot: int, part: slice) -> torch.Tensor:
        """The windows `part` of a slot, on the device.

        Raises:
            OutputError: the file cannot be read.
        """
        if slot < self._in_memory:
            return self._tensor(slot)[part].to(self._device, non_blocking=True)
        states = torch.empty(part.stop - part.start, *self._shape[1:])
        data = states.view(-1).numpy().data.cast("B")
        start = self._offset(slot, part)
        while data:
            read = os.preadv(self._file, [data], start)
            if not read:
                raise OutputError("cannot read activations back: their file has ended; run again")
            data, start = data[read:], start + read
        return states.to(self._device)

    def drop(self, slot: int) -> None:
        """Free a slot's memory."""
        self._tensors.pop(slot, None)

    def _tensor(self, slot: int) -> torch.Tensor:
        if slot not in self._tensors:
            if slot < self._on_device:
                made = torch.empty(self._shape, device=self._device)
            else:
                made = torch.empty(self._shape, pin_memory=self._device.type == "cuda")
            self._tensors[slot] = made
        return self._tensors[slot]

    def _offset(self, slot: int, part: slice) -> int:
        first: int = part.start
        return (slot - self._in_memory) * self._bytes + first * self._window
