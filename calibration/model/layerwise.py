# SPDX-License-Identifier: Apache-2.0
"""The base model, one decoder layer in memory at a time.

`LayerwiseModel` is the model with its embeddings but without the weights of its layers; each layer
is loaded when the hidden states (`activations`) reach it. Peak memory is one layer, the embeddings
and the activations. All computation is in float32.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vllm_eigen.calibration.model.source import Source
from vllm_eigen.calibration.model.transformers_model import auto_config, auto_model
from vllm_eigen.common.errors import InputError

_HEAD = "lm_head.weight"


class LayerwiseModel:
    """A transformers model whose decoder layers are loaded on demand.

    Args:
        source: the base model.
        device: where layers run.
        eager: whether `probabilities` works.

    Raises:
        InputError: weights are missing, damaged, not finite, or of another shape.
    """

    def __init__(self, source: Source, device: torch.device, *, eager: bool = True) -> None:
        self.source = source
        self.device = device
        self._eager = eager
        self._attention = "eager" if source.family.eager_only else "sdpa"
        self.config = auto_config(source)
        _check_head(self.config, source)
        with torch.device("meta"):
            self._model = auto_model(self.config, eager or source.family.eager_only)
        self._model.eval()
        family = source.family
        self._decoder = self._model.get_submodule(family.decoder)
        self._layers = getattr(self._decoder, family.layers)
        self._recorders = [_Recorder(layer) for layer in self._layers]
        setattr(self._decoder, family.layers, nn.ModuleList(self._recorders))
        self._load(self._decoder, family.decoder)
        _make_buffers(self._decoder, self.config, device)

    def with_source(self, source: Source) -> LayerwiseModel:
        """The same model with the layers of another source; the rest is shared."""
        other = copy.copy(self)
        other.source = source
        return other

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    @property
    def compressed_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose cache is compressed."""
        return self.source.family.compressed_layers(self.source.config)

    def inverse_frequencies(self) -> torch.Tensor | None:
        """RoPE frequencies of the compressed layers, one a pair, [rotary_size / 2] in float64;
        None without RoPE."""
        rotary: Any = getattr(self._decoder, "rotary_emb", None)
        if rotary is None:
            return None
        # Some models that mix layers have a table for each kind.
        names = ("full_attention_inv_freq", "inv_freq")
        found: torch.Tensor = getattr(rotary, next(name for name in names if hasattr(rotary, name)))
        return found.detach().cpu().double()

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Hidden states before the first layer, and what each layer takes besides them.

        Args:
            tokens: [batch, length]

        Returns:
            [batch, length, hidden_size] and, per layer, keyword arguments (mask, rotary tables).
        """
        with torch.no_grad():  # not inference mode: a backward pass may keep masks and tables
            self._decoder(input_ids=tokens.to(self.device), use_cache=False)
        first = self._recorders[0].hidden
        assert first is not None
        return first, [recorder.kwargs for recorder in self._recorders]

    def layer(self, index: int) -> nn.Module:
        """Load one decoder layer in float32; the model keeps no reference to it."""
        layer: nn.Module = copy.deepcopy(self._layers[index])
        family = self.source.family
        _set_attention(layer, self._attention)
        self._load(layer, f"{family.decoder}.{family.layers}.{index}")
        return layer

    @contextlib.contextmanager
    def probabilities(self, layer: nn.Module) -> Iterator[None]:
        """While open, `layer` computes eager attention, which returns the probabilities, if the
        model was made with `eager`."""
        if self._eager:
            _set_attention(layer, "eager")
        try:
            yield
        finally:
            _set_attention(layer, self._attention)

    def logits(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [batch, length, vocab_size] from the last layer's output."""
        with torch.inference_mode():
            return self._logits(tokens, hidden.to(self.device))

    def token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [tokens, vocab_size] from rows of the last layer's output, in the graph
        of `hidden` [tokens, hidden_size]; what follows the layers works on each token alone."""
        tokens = torch.zeros(len(hidden), 1, dtype=torch.int64)
        return self._logits(tokens, hidden[:, None]).squeeze(1)

    def _logits(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        head = self._model.get_output_embeddings()
        if head.weight.is_meta:
            with torch.inference_mode(False):  # a backward pass may come later
                self._load_head(head)
        self._recorders[-1].inject = hidden
        try:
            result: torch.Tensor = self._model(
                input_ids=tokens.to(self.device), use_cache=False
            ).logits
        finally:
            self._recorders[-1].inject = None
        return result

    def _load(self, module: nn.Module, path: str) -> None:
        """Fill a meta module's parameters from the checkpoint, in float32."""
        for name, parameter in list(module.named_parameters()):
            tensor = self._checked(f"{path}.{name}", parameter.shape)
            _assign(module, name, tensor, self.device)

    def _load_head(self, head: nn.Module) -> None:
        if _HEAD not in self.source.tensors:
            head.weight = self._model.get_input_embeddings().weight
            return
        _assign(head, "weight", self._checked(_HEAD, head.weight.shape), self.device)

    def _checked(self, name: str, shape: Any) -> torch.Tensor:
        tensor = self.source.tensors.get(name)
        if tensor.shape != shape:
            raise InputError(
                f"{self.source.folder}: tensor {name} has shape {list(tensor.shape)}, config.json "
                f"asks for {list(shape)}; the files do not belong together"
            )
        return tensor


class _Recorder(nn.Module):
    """Takes a layer's place: records its inputs, and returns them or `inject`."""

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


def _set_attention(layer: nn.Module, implementation: str) -> None:
    """Set transformers' attention implementation; MPT's layers have one only and ignore it."""
    for module in layer.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = implementation


def _check_head(config: Any, source: Source) -> None:
    if _HEAD not in source.weights and not config.tie_word_embeddings:
        raise InputError(
            f"{source.folder}: tensor {_HEAD} is missing and config.json has "
            "tie_word_embeddings=false; download the model again, or set it to true if the "
            "embedding is the output projection too"
        )


def _assign(module: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    value = tensor.to(device=device, dtype=torch.float32)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def _make_buffers(decoder: nn.Module, config: Any, device: torch.device) -> None:
    """Rotary tables are computed, not stored: make their module again off the meta device."""
    for name, child in list(decoder.named_children()):
        if (scale := getattr(child, "scalar_embed_scale", None)) is not None:
            child.register_buffer("embed_scale", torch.tensor(scale, device=device), False)
        elif any(buffer.is_meta for buffer in child.buffers()):
            setattr(decoder, name, type(child)(config=config).to(device))
