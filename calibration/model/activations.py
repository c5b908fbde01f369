# SPDX-License-Identifier: Apache-2.0
"""The calibration text's hidden states, on their way through the model's layers.

An `ActivationStream` holds the hidden states of all windows between two layers. Each layer
overwrites them with its output. Past `MEMORY_LIMIT` bytes they are kept in a memory-mapped file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_eigen.calibration.model.device import batch_windows
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.common.errors import OutputError

MEMORY_LIMIT = 4 << 30
"""Bytes of activations kept in memory; larger sets are memory-mapped."""


class LayerCalls:
    """Calls layers as the model would, with masks and rotary tables for the batch's shape.

    Args:
        layerwise: the model of the layers.
    """

    def __init__(self, layerwise: LayerwiseModel) -> None:
        self._layerwise = layerwise
        self._kwargs: dict[int, list[dict[str, Any]]] = {}

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer for tokens [windows, length], on the device."""
        embedded, self._kwargs[len(tokens)] = self._layerwise.embed(tokens)
        return embedded

    def layer(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The output of layer `index`, with a graph if the caller's mode makes one.

        Args:
            hidden: [windows, length, hidden_size] on the device, of the length of `embed`.
        """
        if len(hidden) not in self._kwargs:
            self.embed(torch.zeros(hidden.shape[:2], dtype=torch.int64))
        result = layer(hidden, **self._kwargs[len(hidden)][index])
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output


class ActivationStream:
    """Hidden states of the calibration windows before the next layer.

    Args:
        layerwise: the model they flow through.
        tokens: [num_windows, length]
        memory_limit: most bytes kept in memory.
        offload_folder: where a larger set is memory-mapped; the system's temporary folder if None.

    Attributes:
        hidden: [num_windows, length, hidden_size], float32 on the CPU.

    Raises:
        OutputError: the disk is too small for the activations.
    """

    def __init__(
        self,
        layerwise: LayerwiseModel,
        tokens: torch.Tensor,
        *,
        memory_limit: int = MEMORY_LIMIT,
        offload_folder: Path | None = None,
    ) -> None:
        self._layerwise = layerwise
        self._batch = batch_windows(layerwise.device, tokens.shape[1])
        self._calls = LayerCalls(layerwise)
        shape = (*tokens.shape, layerwise.source.geometry.hidden_size)
        self.hidden = allocate(shape, memory_limit, offload_folder)
        for part in self.batch_slices(len(tokens)):
            self.hidden[part] = self._calls.embed(tokens[part]).cpu()

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def batches(self) -> int:
        """Forward calls per layer."""
        return -(-len(self) // self._batch)

    def advance(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Run layer `index` on all windows in place, one step of the iterator per batch."""
        for part in self.batch_slices(len(self)):
            self.hidden[part] = self.run(index, layer, self.hidden[part])
            yield

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The output of layer `index` for hidden states [windows, length, hidden_size]; CPU."""
        outputs = []
        for part in self.batch_slices(len(hidden)):
            with torch.inference_mode():
                result = self._calls.layer(index, layer, hidden[part].to(self._layerwise.device))
            outputs.append(result.cpu())
        return torch.cat(outputs)

    def batch_slices(self, count: int) -> Iterator[slice]:
        """The windows of each forward call, of `count` windows."""
        for start in range(0, count, self._batch):
            yield slice(start, min(start + self._batch, count))


def after_layers(
    model: LayerwiseModel,
    tokens: torch.Tensor,
    step: Callable[[], None] = lambda: None,
    hooks: Callable[[int, nn.Module], AbstractContextManager[Any]] | None = None,
) -> ActivationStream:
    """Hidden states of tokens [num_windows, length] after the last layer; `step` once a layer.

    Args:
        hooks: what changes a layer while it runs, by its index.
    """
    stream = ActivationStream(model, tokens)
    for index in range(model.num_layers):
        layer = model.layer(index)
        with contextlib.nullcontext() if hooks is None else hooks(index, layer):
            for _ in stream.advance(index, layer):
                pass
        step()
    return stream


def allocate(shape: tuple[int, ...], limit: int, folder: Path | None = None) -> torch.Tensor:
    """Float32 storage in memory, or in an unlinked memory-mapped file past `limit` bytes.

    Raises:
        OutputError: the disk is too small.
    """
    count = 1
    for size in shape:
        count *= size
    if count * 4 <= limit:
        return torch.empty(shape)
    with reserved_file(folder, count * 4) as (_, path):
        return torch.from_file(path, shared=True, size=count, dtype=torch.float32).view(shape)


@contextlib.contextmanager
def reserved_file(folder: Path | None, size: int) -> Iterator[tuple[int, str]]:
    """Descriptor and path of a file of `size` bytes, closed and unlinked when the block is left.

    Whoever maps it or duplicates the descriptor keeps its content, without a name: nothing is left
    behind however the process ends.

    Args:
        folder: where it is; the system's temporary folder if None.

    Raises:
        OutputError: the disk is too small.
    """
    where = Path(folder or tempfile.gettempdir())
    try:
        where.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="activations.", dir=where)
        try:
            # Reserved now: a full disk is an error here, not in the middle.
            os.posix_fallocate(handle, 0, size)
            yield handle, name
        finally:
            os.close(handle)
            os.unlink(name)
    except OSError as error:
        raise OutputError(
            f"cannot reserve {size / 2**30:.1f} GiB for activations in {where}: "
            f"{error.strerror}; free space, set TMPDIR, or use fewer --samples"
        ) from error
