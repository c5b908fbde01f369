"""An Eigen checkpoint as a model that caches latents, and may be trained, in plain PyTorch.

The base architecture's transformers model computes everything but the projections. Where these
are folded, small modules take their place, from hidden states to latents and from latents to keys
or values (`factors`); where they are the base model's, hooks pass keys or values through the
bases. Either way the latents are at hand, to be rounded (`scales`), watched or trained, and the
checkpoint's tensors can be read back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from calibration.factors import KeyFactors, ValueFactors, read_keys, read_values
from calibration.fold import Maps, Tensors, keep_keys, keep_values
from calibration.source import Weights
from calibration.taps import Latents, Part, compress
from calibration.unfold import bare_model, read_bases
from vllm_eigen.checkpoint import EigenConfig, read_config
from vllm_eigen.families import Family, Geometry, KeyMode, family_of


class LowRankLayer(nn.Module):
    """The low-rank part of one layer.

    Attributes:
        cache: what the cache does to latents; None keeps them as they are.
        keys, values: how either is made of low rank.
    """

    def __init__(
        self, weights: Tensors, path: str, family: Family, eigen: EigenConfig, index: int
    ) -> None:
        super().__init__()
        self.cache: Latents | None = None
        self._family, self._key_mode = family, eigen.key_mode
        where = weights, path, family, eigen, index
        key, value = read_bases(weights, path, eigen)
        self.keys = (
            _Beside(keep_keys, key, eigen.head_size)
            if key
            else _FoldedKeys(read_keys(*where), family, eigen.key_mode, self._of("key"))
        )
        self.values = (
            _Beside(keep_values, value, eigen.head_size)
            if value
            else _FoldedValues(read_values(*where), family, self._of("value"))
        )

    @contextlib.contextmanager
    def inside(self, layer: nn.Module, geometry: Geometry) -> Iterator[None]:
        """Put what is folded into a transformers layer for good, and hooks while open."""
        attention = layer.get_submodule(self._family.attention)
        parts: dict[str, nn.Module] = {}
        for side in (self.keys, self.values):
            parts |= side.put_into(attention)
        if self._family.qkv_proj and parts:
            parts = {self._family.qkv_proj: _Fused(*parts.values())}
        for name, module in parts.items():
            setattr(attention, name, module)
        maps = self.keys.maps(), self.values.maps()
        if not any(maps):
            yield
            return
        with compress(
            layer, self._family, geometry, self._key_mode, *maps, latents=self.through_cache
        ):
            yield

    def matrices(self) -> list[nn.Module]:
        """Modules whose `weight`, as wide as the model, may be adapted."""
        return [*self.keys.matrices(), *self.values.matrices()]

    def bases(self) -> list[nn.Parameter]:
        """Tensors of the size of heads, which may be trained as they are."""
        return [*self.keys.bases(), *self.values.bases()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors of this layer, by their names in the attention module."""
        return self.keys.tensors() | self.values.tensors()

    def through_cache(self, part: Part, latents: torch.Tensor) -> torch.Tensor:
        """What attention sees of latents of any shape."""
        return latents if self.cache is None else self.cache(part, latents)

    def _of(self, part: Part) -> Callable[[torch.Tensor], torch.Tensor]:
        return partial(self.through_cache, part)


class LowRankModel:
    """The compressed model, in float32.

    Args:
        folder: an Eigen checkpoint with weights.

    Attributes:
        eigen: its `eigen` section.
        model: a transformers model of the base architecture.
        layers: the low-rank parts of it, first layer first.

    Raises:
        CheckpointError, InputError: the checkpoint is damaged.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        config, self.eigen = read_config(folder)
        self.family = family_of(config)
        self.model: Any = bare_model(folder, device)
        self.layers: list[LowRankLayer] = []
        self._hooks = contextlib.ExitStack()
        weights = Weights(folder, self.family)
        for index in range(len(self.eigen.layers)):
            path = self.family.attention_path(index)
            layer = LowRankLayer(weights, path, self.family, self.eigen, index)
            layer.to(self.model.device)
            place = self.model.get_submodule(path.removesuffix(f".{self.family.attention}"))
            self._hooks.enter_context(layer.inside(place, self.family.geometry(config)))
            self.layers.append(layer)
        # The model alone keeps the hooks, as long as it lives.
        self.model.eigen_hooks = self._hooks

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint's attention tensors by full name, on the CPU; biases even if zero."""
        return {
            f"{self.family.attention_path(index)}.{name}": tensor.detach().cpu()
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()
        }


class _FoldedKeys(nn.Module):
    """Projections to queries and key latents, and the basis that makes keys of these."""

    def __init__(
        self,
        factors: KeyFactors,
        family: Family,
        key_mode: KeyMode,
        cache: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self._family, self._key_mode = family, key_mode
        self.q = _Rows(factors.q)
        self.k = _Latent(factors.k, factors.basis, cache)

    def put_into(self, attention: nn.Module) -> dict[str, nn.Module]:
        """The modules that take the places of projections of an attention module."""
        return {self._family.q_proj: self.q, self._family.k_proj: self.k}

    def maps(self) -> None:
        """Nothing is left to hooks."""

    def matrices(self) -> list[nn.Module]:
        """Of queries and latents."""
        return [self.q, self.k]

    def bases(self) -> list[nn.Parameter]:
        """What is stored; another only pads or rotates, and is folded into q."""
        return [self.k.basis] if self._key_mode == "pre-rope" else []

    def tensors(self) -> dict[str, torch.Tensor]:
        """Folded again."""
        factors = KeyFactors(self.q.rows(), self.k.rows(), self.k.basis)
        return factors.folded(self._family, self._key_mode)


class _FoldedValues(nn.Module):
    """The projection to value latents, the basis that makes values of these, and the output's."""

    def __init__(
        self, factors: ValueFactors, family: Family, cache: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self._family, self._heads = family, factors.o.shape[1]
        self.v = _Latent(factors.v, factors.basis, cache)
        self.o: Any = None

    def put_into(self, attention: nn.Module) -> dict[str, nn.Module]:
        """As `_FoldedKeys.put_into`; the output projection is of the base's head size already."""
        self.o = attention.get_submodule(self._family.o_proj)
        return {self._family.v_proj: self.v}

    def maps(self) -> None:
        """Nothing is left to hooks."""

    def matrices(self) -> list[nn.Module]:
        """Of latents and output."""
        return [self.v, self.o]

    def bases(self) -> list[nn.Parameter]:
        """None: it only pads or rotates, and is folded into o."""
        return []

    def tensors(self) -> dict[str, torch.Tensor]:
        """Folded again."""
        output = self.o.weight.reshape(len(self.o.weight), self._heads, -1)
        return ValueFactors(self.v.rows(), output, self.v.basis).folded(self._family)


class _Beside(nn.Module):
    """Bases beside projections that stay the base model's.

    Args:
        keep: makes the checkpoint's tensors of maps.
    """

    def __init__(
        self, keep: Callable[[Maps, int], dict[str, torch.Tensor]], maps: Maps, head_size: int
    ) -> None:
        super().__init__()
        self._keep, self._head_size = keep, head_size
        encoder, decoder = (nn.Parameter(part) for part in maps)
        self._maps = nn.ParameterList((encoder, _keeping_zeros(decoder)))

    def put_into(self, attention: nn.Module) -> dict[str, nn.Module]:
        """No module changes its place."""
        return {}

    def maps(self) -> Maps:
        """Encoder and decoder, shared with this module."""
        encoder, decoder = self._maps
        return encoder, decoder

    def matrices(self) -> list[nn.Module]:
        """None: they are the base model's."""
        return []

    def bases(self) -> list[nn.Parameter]:
        """Encoder and decoder."""
        return list(self._maps)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Both of them."""
        return self._keep(self.maps(), self._head_size)


class _Rows(nn.Module):
    """A linear map to heads, made of [heads, size, hidden_size + 1] with the bias last."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self._shape = rows.shape[:2]
        self.weight = nn.Parameter(rows[..., :-1].flatten(0, 1).float())
        self.bias = nn.Parameter(rows[..., -1].flatten().float())

    def rows(self) -> torch.Tensor:
        """What it is made of."""
        stacked = torch.cat([self.weight, self.bias[:, None]], dim=1)
        return stacked.reshape(*self._shape, -1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] to [..., heads * size]."""
        return linear(hidden, self.weight, self.bias)


class _Latent(_Rows):
    """A linear map to latents, through the cache, to the base model's KV heads."""

    def __init__(
        self, rows: torch.Tensor, basis: torch.Tensor, cache: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__(rows)
        self._cache = cache
        self.basis = _keeping_zeros(nn.Parameter(basis.float().contiguous()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] to [..., num_kv_heads * head_size]."""
        latents = self._cache(super().forward(hidden).unflatten(-1, self._shape))
        heads = latents.repeat_interleave(len(self.basis) // self._shape[0], dim=-2)
        return torch.einsum("...jr,jrd->...jd", heads, self.basis).flatten(-2)


def _keeping_zeros(basis: nn.Parameter) -> nn.Parameter:
    """The same basis; what is zero of it stays so in training, for kernels need not read it."""
    present = basis.detach() != 0
    basis.register_hook(lambda gradient: gradient * present.to(gradient.device))
    return basis


class _Fused(nn.Module):
    """Queries, keys and values from one module, as MPT has them."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] to [..., 3 * num_heads * head_size]."""
        return torch.cat([part(hidden) for part in self.parts], dim=-1)
