# SPDX-License-Identifier: Apache-2.0
"""Memory for the partial results of split-KV decode: bounded, and allocated before the first step.

A row is one (sequence, query, head, split). Their number is known on the device only; what the
host knows is an upper bound, which for many sequences and long contexts is gigabytes. So a step's
sequences are served some at a time where they need more than MAX_BYTES. What is computed of a
sequence does not depend on that.

A model has one, though vLLM makes a metadata builder for each group of equal pages: their layers
run one after the other, and one each would take as often MAX_BYTES. Builders reserve it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

MAX_BYTES = 192 << 20
ALIGNED_SEQS = 4
"""Sequences of a part: tables of int32 then begin on 16 bytes, as Triton compiled for."""


@dataclass(frozen=True)
class Partials:
    """Float32 views of the workspace: acc `[*rows, width]`, row_max and row_sum `[*rows]`."""

    acc: torch.Tensor
    row_max: torch.Tensor
    row_sum: torch.Tensor


class Workspace:
    """One buffer for all layers; it grows until `reserve` was given the most that steps need."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def reserve(self, num_seqs: int, rows: tuple[int, ...], width: int, device: Device) -> None:
        """Allocate for steps of up to `num_seqs` sequences.

        Args:
            rows: of one sequence: queries, heads, splits.
            width: numbers of a row.
        """
        of_one = prod(rows) * (width + 2)
        # All of MAX_BYTES where that is not enough: smaller rows, of which more go at once, use it.
        numbers = max(of_one, min(num_seqs * of_one, MAX_BYTES // 4))
        if self._buffer is None or self._buffer.numel() < numbers:
            self._buffer = torch.empty(numbers, dtype=torch.float32, device=device)

    def parts(
        self, num_seqs: int, rows: tuple[int, ...], width: int, device: Device
    ) -> Iterator[tuple[slice, Partials]]:
        """Divide a step's sequences into parts that fit, each with its rows.

        Nothing is allocated where enough was reserved. Arguments are those of `reserve`.
        """
        self.reserve(num_seqs, rows, width, device)
        buffer = self._buffer
        assert buffer is not None
        at_once = min(num_seqs, _seqs_at_once(rows, width))
        for start in range(0, num_seqs, at_once):
            part = slice(start, min(num_seqs, start + at_once))
            shape = (part.stop - start, *rows)
            count = prod(shape)
            yield (
                part,
                Partials(
                    buffer[: count * width].view(*shape, width),
                    buffer[count * width : count * (width + 1)].view(shape),
                    buffer[count * (width + 1) : count * (width + 2)].view(shape),
                ),
            )


Device = torch.device | str


def _seqs_at_once(rows: tuple[int, ...], width: int) -> int:
    """Sequences that MAX_BYTES have room for, at least one."""
    bytes_of_one = 4 * prod(rows) * (width + 2)
    if bytes_of_one == 0:
        return 1 << 30
    found = MAX_BYTES // bytes_of_one
    return max(1, found - found % ALIGNED_SEQS if found > ALIGNED_SEQS else found)
