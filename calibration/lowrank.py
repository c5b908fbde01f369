"""An Eigen checkpoint as a model that caches latents, and may be trained, in plain PyTorch.

The base architecture's transformers model computes everything but the projections. Where these
are folded, small modules take their place, from hidden states to latents and from latents to keys
and values (`factors`); where they are the base model's, hooks pass keys and values through the
bases. Either way the latents are at hand, to be rounded (`scales`), watched or trained, and the
checkpoint's tensors can be read back.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from calibration.factors import Factors, read_factors
from calibration.fold import Maps, keep_apart
from calibration.source import Weights
from calibration.taps import Latents, Part, compress
from calibration.unfold import bare_model, read_bases
from vllm_eigen.checkpoint import read_config
from vllm_eigen.families import Family, KeyMode, family_of


class LowRankLayer(nn.Module, ABC):
    """The low-rank part of one layer.

    Attributes:
        cache: what the cache does to latents; None keeps them as they are.
    """

    cache: Latents | None = None

    @abstractmethod
    def matrices(self) -> list[nn.Module]:
        """Modules whose `weight`, as wide as the model, may be adapted."""

    @abstractmethod
    def bases(self) -> list[nn.Parameter]:
        """Tensors of the size of heads, which may be trained as they are."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors of this layer, by their names in the attention module."""

    def through_cache(self, part: Part, latents: torch.Tensor) -> torch.Tensor:
        """What attention sees of latents of any shape."""
        return latents if self.cache is None else self.cache(part, latents)


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
            if self.eigen.projections == "folded":
                factors = read_factors(weights, path, self.family, self.eigen, index)
                folded = _Folded(factors, self.family, self.eigen.key_mode)
                folded.put_into(self.model.get_submodule(path), self.model.device)
                self.layers.append(folded)
                continue
            beside = _Beside(*read_bases(weights, path, self.eigen), self.eigen.head_size)
            beside.to(self.model.device)
            self._hooks.enter_context(
                compress(
                    self.model.get_submodule(path.removesuffix(f".{self.family.attention}")),
                    self.family,
                    self.family.geometry(config),
                    self.eigen.key_mode,
                    *beside.maps(),
                    latents=beside.through_cache,
                )
            )
            self.layers.append(beside)
        # The model alone keeps the hooks, as long as it lives.
        self.model.eigen_hooks = self._hooks

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint's attention tensors by full name, on the CPU; biases even if zero."""
        return {
            f"{self.family.attention_path(index)}.{name}": tensor.detach().cpu()
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()
        }


class _Folded(LowRankLayer):
    """Projections to queries and latents, and the bases that make keys and values of these."""

    def __init__(self, factors: Factors, family: Family, key_mode: KeyMode) -> None:
        super().__init__()
        self._family, self._key_mode, self._heads = family, key_mode, factors.q.shape[:2]
        self.q = _Rows(factors.q)
        self.k = _Latent(factors.k, factors.key_basis, partial(self.through_cache, "key"))
        self.v = _Latent(factors.v, factors.value_basis, partial(self.through_cache, "value"))
        self.o: Any = None

    def put_into(self, attention: nn.Module, device: torch.device) -> None:
        """Take the places of the projections in a transformers attention module."""
        family = self._family
        self.to(device)
        self.o = attention.get_submodule(family.o_proj)  # of the base's head size already
        if family.qkv_proj:
            setattr(attention, family.qkv_proj, _Fused(self.q, self.k, self.v))
            return
        for name, module in (
            (family.q_proj, self.q),
            (family.k_proj, self.k),
            (family.v_proj, self.v),
        ):
            setattr(attention, name, module)

    def matrices(self) -> list[nn.Module]:
        """Of queries, latents and output."""
        return [self.q, self.k, self.v, self.o]

    def bases(self) -> list[nn.Parameter]:
        """Those stored; others only pad or rotate, and are folded into q and o."""
        return [self.k.basis] if self._key_mode == "pre-rope" else []

    def tensors(self) -> dict[str, torch.Tensor]:
        """Folded again."""
        factors = Factors(
            self.q.rows(),
            self.k.rows(),
            self.v.rows(),
            self.o.weight.reshape(-1, *self._heads),
            self.k.basis,
            self.v.basis,
        )
        return factors.folded(self._family, self._key_mode)


class _Beside(LowRankLayer):
    """Bases beside projections that stay the base model's."""

    def __init__(self, key: Maps, value: Maps, head_size: int) -> None:
        super().__init__()
        self._head_size = head_size
        self._maps = nn.ParameterList([*key, *value])

    def maps(self) -> tuple[Maps, Maps]:
        """Of keys and of values, shared with this module."""
        maps = list(self._maps)
        return (maps[0], maps[1]), (maps[2], maps[3])

    def matrices(self) -> list[nn.Module]:
        """None: they are the base model's."""
        return []

    def bases(self) -> list[nn.Parameter]:
        """Encoders and decoders."""
        return list(self._maps)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The four of them."""
        return keep_apart(*self.maps(), self._head_size)


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
        self.basis = nn.Parameter(basis.float().contiguous())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] to [..., num_kv_heads * head_size]."""
        latents = self._cache(super().forward(hidden).unflatten(-1, self._shape))
        heads = latents.repeat_interleave(len(self.basis) // self._shape[0], dim=-2)
        return torch.einsum("...jr,jrd->...jd", heads, self.basis).flatten(-2)


class _Fused(nn.Module):
    """Queries, keys and values from one module, as MPT has them."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] to [..., 3 * num_heads * head_size]."""
        return torch.cat([part(hidden) for part in self.parts], dim=-1)
