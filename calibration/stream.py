"""The base model, one decoder layer in memory at a time.

`Skeleton` is the model with its embeddings but with empty layers; `Stream` is the calibration
text's hidden states, which flow through layer after layer in place. Peak memory is one layer,
the embeddings, and the activations, which go to a memory-mapped file past a limit. All
computation is in float32.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibration.source import Source
from vllm_eigen.errors import InputError, OutputError, UsageError

SPILL_LIMIT = 4 << 30
"""Bytes of activations kept in memory; larger sets are memory-mapped."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one forward call, in whole windows."""


class Skeleton:
    """A transformers model whose decoder layers are loaded on demand.

    Args:
        source: the base model.
        device: where layers run.
        eager: layers can be made to give their attention probabilities.

    Raises:
        InputError: weights are missing, damaged, not finite, or of another shape.
    """

    def __init__(self, source: Source, device: torch.device, *, eager: bool = True) -> None:
        self.source = source
        self.device = device
        self._eager = eager
        self.config = auto_config(source)
        with torch.device("meta"):
            self._model = auto_model(self.config, eager)
        self._model.eval()
        family = source.family
        self._decoder = self._model.get_submodule(family.decoder)
        self._layers = getattr(self._decoder, family.layers)
        taps = [_Recorder(layer) for layer in self._layers]
        setattr(self._decoder, family.layers, nn.ModuleList(taps))
        self._taps = taps
        _load(self._decoder, family.decoder, source, device)
        _rebuild_buffers(self._decoder, self.config, device)

    def with_source(self, source: Source) -> Skeleton:
        """The same model with the layers of another source; the rest is shared."""
        other = copy.copy(self)
        other.source = source
        return other

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    def inverse_frequencies(self) -> torch.Tensor | None:
        """Rotary angle per position and plane, [rotary_size / 2] in float64; None without it."""
        rotary = getattr(self._decoder, "rotary_emb", None)
        return None if rotary is None else rotary.inv_freq.detach().cpu().double()

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Hidden states before the first layer, and what each layer takes besides them.

        Args:
            tokens: [batch, length]

        Returns:
            [batch, length, hidden_size] and, per layer, keyword arguments (mask, rotary tables).
        """
        with torch.inference_mode():
            self._decoder(input_ids=tokens.to(self.device), use_cache=False)
        first = self._taps[0].hidden
        assert first is not None
        return first, [tap.kwargs for tap in self._taps]

    def layer(self, index: int) -> nn.Module:
        """Load one decoder layer in float32; it lives as long as the caller keeps it."""
        layer: nn.Module = copy.deepcopy(self._layers[index])
        _attend(layer, "sdpa")
        family = self.source.family
        _load(layer, f"{family.decoder}.{family.layers}.{index}", self.source, self.device)
        return layer

    @contextlib.contextmanager
    def probabilities(self, layer: nn.Module) -> Iterator[None]:
        """While open, `layer` computes attention in the slow way that gives the probabilities, if
        the model was made for that."""
        if self._eager:
            _attend(layer, "eager")
        try:
            yield
        finally:
            _attend(layer, "sdpa")

    def logits(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [batch, length, vocab_size] from the last layer's output."""
        head = self._model.get_output_embeddings()
        if head.weight.is_meta:
            _load_head(self._model, head, self.source, self.device)
        self._taps[-1].inject = hidden.to(self.device)
        try:
            with torch.inference_mode():
                result: torch.Tensor = self._model(
                    input_ids=tokens.to(self.device), use_cache=False
                ).logits
        finally:
            self._taps[-1].inject = None
        return result


class Stream:
    """Hidden states of the calibration windows, [num_windows, length, hidden_size] in float32.

    Args:
        skeleton: the model they flow through.
        tokens: [num_windows, length]
        spill_limit: bytes kept in memory.
        spill_folder: where a larger set is memory-mapped; the system's temporary folder if None.

    Raises:
        OutputError: the disk is too small for the activations.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: torch.Tensor,
        *,
        spill_limit: int = SPILL_LIMIT,
        spill_folder: Path | None = None,
    ) -> None:
        self._skeleton = skeleton
        self._batch = max(1, BATCH_TOKENS[skeleton.device.type] // tokens.shape[1])
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        shape = (*tokens.shape, skeleton.source.geometry.hidden_size)
        self.hidden = allocate(shape, spill_limit, spill_folder)
        for part in self.parts(len(tokens)):
            embedded, kwargs = skeleton.embed(tokens[part])
            self._kwargs[len(embedded)] = kwargs
            self.hidden[part] = embedded.cpu()

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def batches(self) -> int:
        """Forward calls per layer."""
        return -(-len(self) // self._batch)

    def advance(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Push all windows through `layer` in place, one step of the iterator per batch."""
        for part in self.parts(len(self)):
            self.hidden[part] = self.run(index, layer, self.hidden[part])
            yield

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The output of layer `index` for some windows, on the CPU."""
        outputs = []
        for part in self.parts(len(hidden)):
            states = hidden[part].to(self._skeleton.device)
            kwargs = self._kwargs.get(len(states))
            if kwargs is None:
                blank = torch.zeros(states.shape[:2], dtype=torch.int64)
                kwargs = self._kwargs[len(states)] = self._skeleton.embed(blank)[1]
            with torch.inference_mode():
                result = layer(states, **kwargs[index])
            outputs.append((result[0] if isinstance(result, tuple) else result).cpu())
        return torch.cat(outputs)

    def parts(self, count: int) -> Iterator[slice]:
        """The windows of each forward call."""
        for start in range(0, count, self._batch):
            yield slice(start, min(start + self._batch, count))


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
    where = Path(folder or tempfile.gettempdir())
    try:
        where.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="activations.", dir=where)
        try:
            # Reserved now: a full disk is an error here, not a bus error in the middle.
            os.posix_fallocate(handle, 0, count * 4)
            # Unlinked once mapped: nothing is left behind however the process ends.
            return torch.from_file(name, shared=True, size=count, dtype=torch.float32).view(shape)
        finally:
            os.close(handle)
            os.unlink(name)
    except OSError as error:
        raise OutputError(
            f"cannot spill {count * 4 / 2**30:.1f} GiB of activations to {where}: "
            f"{error.strerror}; free space, set TMPDIR, or use fewer --samples"
        ) from error


def pick_device(name: str) -> torch.device:
    """The device called `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible; use --device cpu")
    if name not in BATCH_TOKENS:
        raise UsageError(f"--device {name} is unknown; choose cpu, cuda or auto")
    return torch.device(name)


class _Recorder(nn.Module):
    """Stands in a layer's place: notes what the layer would have been given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        self.inject: torch.Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        # MPT's model unpacks a tuple, the others take the tensor itself.
        self._tuple = type(layer).__name__ == "MptBlock"
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> Any:
        self.hidden, self.kwargs = hidden, kwargs
        result = hidden if self.inject is None else self.inject
        return (result, None) if self._tuple else result


def _attend(layer: nn.Module, implementation: str) -> None:
    """Choose how a layer computes attention, by transformers' names; MPT's knows only one way."""
    for module in layer.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = implementation


def auto_config(source: Source) -> Any:
    """The model's configuration as transformers reads it.

    Raises:
        InputError: it is not usable.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{source.folder}/config.json is not usable: {reason}") from error


def auto_model(config: Any, eager: bool) -> Any:
    """A transformers model in float32, with the attention that gives its probabilities if eager."""
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    # Eager attention is the one that hands out its probabilities.
    options = {"attn_implementation": "eager"} if eager else {}
    return build(config, dtype=torch.float32, **options)


def _load(module: nn.Module, path: str, source: Source, device: torch.device) -> None:
    """Fill a meta module's parameters from the checkpoint, in float32."""
    for name, parameter in list(module.named_parameters()):
        full = f"{path}.{name}"
        _assign(module, name, _checked(source, full, parameter.shape), device)


def _load_head(model: Any, head: nn.Module, source: Source, device: torch.device) -> None:
    name = "lm_head.weight"
    if name not in source.weights:
        head.weight = model.get_input_embeddings().weight
        return
    _assign(head, "weight", _checked(source, name, head.weight.shape), device)


def _checked(source: Source, name: str, shape: Any) -> torch.Tensor:
    tensor = source.weights.get(name)
    if tensor.shape != shape:
        raise InputError(
            f"{source.folder}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
            f"{list(shape)}; the files do not belong together"
        )
    return tensor


def _assign(module: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    value = tensor.to(device=device, dtype=torch.float32)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def _rebuild_buffers(decoder: nn.Module, config: Any, device: torch.device) -> None:
    """Rotary tables are computed, not stored: build their module again off the meta device."""
    for name, child in list(decoder.named_children()):
        if any(buffer.is_meta for buffer in child.buffers()):
            setattr(decoder, name, type(child)(config=config).to(device))
