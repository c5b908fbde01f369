# SPDX-License-Identifier: Apache-2.0
"""An Eigen checkpoint as a plain PyTorch model: what it computes, without vLLM.

It is the base architecture's transformers model, in float32. Its projections have full size and
hooks apply the maps of keys and values (`unfold`, `hooks.compress`), so that the latents are at
hand. Users are the evaluation (latents rounded as an fp8 cache does), fine-tuning (projections and
maps as parameters, written back as a checkpoint), and tests, as the reference of vLLM's logits.
Calibration applies the same hooks to layers that it loads one by one (`layerwise`).
"""

from __future__ import annotations

from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_eigen.calibration.methods.basis import LayerMaps
from vllm_eigen.calibration.model.fold import compressed_tensors
from vllm_eigen.calibration.model.hooks import (
    LayerCache,
    Part,
    SimulatedCache,
    coded_cache,
    compress,
)
from vllm_eigen.calibration.model.source import ModelTensors, Weights
from vllm_eigen.calibration.model.transformers_model import load_model
from vllm_eigen.calibration.model.unfold import UnfoldedLayer, unfold_layer
from vllm_eigen.checkpoint.config import (
    EigenConfig,
    read_config,
)
from vllm_eigen.checkpoint.families import Family, Geometry, family_of
from vllm_eigen.checkpoint.shapes import BESIDE, needed_biases
from vllm_eigen.checkpoint.validate import validate


def load_reference(
    folder: Path,
    device: torch.device | str = "cpu",
    cache: LayerCache | None = None,
) -> Any:
    """The compressed model as a transformers model in float32, with its hooks.

    Args:
        cache: None rounds coded latents as the kernels do, and keeps others as they are.

    Raises:
        CheckpointError, InputError: the checkpoint is damaged.
    """
    compressed = CompressedModel(folder, device)
    if cache is not None:
        for layer, ranks in zip(compressed.layers, compressed.eigen.layers, strict=True):
            layer.cache = cache(ranks)
    return compressed.model


class CompressedModel:
    """The compressed model with its low-rank parts at hand.

    Args:
        folder: an Eigen checkpoint with weights.

    Attributes:
        eigen: its `eigen` section.
        model: a transformers model of the base architecture, with hooks.
        layers: the compression of its compressed layers, first layer first.

    Raises:
        CheckpointError, InputError: the checkpoint is damaged.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        validate(folder)
        config, self.eigen = read_config(folder)
        self.family = family_of(config)
        weights = Weights(folder, self.family)
        unfolded = [
            unfold_layer(weights, path, self.family, self.eigen, ranks)
            for path, ranks in zip(self._paths(), self.eigen.layers, strict=True)
        ]
        base = {name: value for name, value in config.items() if name != "eigen"}
        base["architectures"] = [self.family.architecture]
        tensors = self._tensors(weights, unfolded)
        self.model: Any = load_model(base, tensors, device, self._biases())
        self.layers: list[CompressedLayer] = []
        described = zip(self.eigen.layer_indices, self.eigen.layers, unfolded, strict=True)
        for index, ranks, found in described:
            path = f"{self.family.decoder}.{self.family.layers}.{index}"
            place = self.model.get_submodule(path)
            geometry = self.family.geometry(config)
            layer = CompressedLayer(place, found, self.family, geometry, self.eigen)
            layer.cache = coded_cache(ranks)
            self.layers.append(layer)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint's compressed attention tensors by full name, on the CPU."""
        return {
            f"{path}.{name}": tensor.detach().cpu()
            for path, layer in zip(self._paths(), self.layers, strict=True)
            for name, tensor in layer.tensors().items()
        }

    def _paths(self) -> list[str]:
        """Of the attention modules of the compressed layers."""
        return [self.family.attention_path(index) for index in self.eigen.layer_indices]

    def _biases(self) -> set[str]:
        """Biases that the offsets need, in the base architecture's model."""
        family = self.family
        folded = self.eigen.projections.folds_values
        fused = {family.k_proj, family.v_proj} if family.qkv_proj and folded else set()
        return {
            f"{path}.{family.qkv_proj if name in fused else name}.bias"
            for path in self._paths()
            for name in needed_biases(self.eigen, family)
        }

    def _tensors(self, weights: Weights, unfolded: list[UnfoldedLayer]) -> dict[str, torch.Tensor]:
        """All tensors of the base architecture's model."""
        family = self.family
        tensors = {
            f"{path}.{name}": tensor
            for path, layer in zip(self._paths(), unfolded, strict=True)
            for name, tensor in layer.projections.items()
        }
        dropped = tuple(f".{name}" for name in BESIDE)
        if family.qkv_proj and self.eigen.projections.folds_values:
            parts = (family.q_proj, family.k_proj, family.v_proj)
            dropped += tuple(f".{part}.{kind}" for part in parts for kind in ("weight", "bias"))
        stored = ModelTensors(weights, family)
        for name in stored:
            if name not in tensors and not name.endswith(dropped):
                tensors[name] = stored.get(name)
        return tensors


class CompressedLayer:
    """The compression of one layer of a transformers model, by hooks that it registers for good.

    Attributes:
        cache: what attention reads back for the latents; None: the latents themselves.
        key, value: their maps, float32. Parameters are those that the checkpoint stores.
    """

    def __init__(
        self,
        layer: nn.Module,
        unfolded: UnfoldedLayer,
        family: Family,
        geometry: Geometry,
        eigen: EigenConfig,
    ) -> None:
        self.cache: SimulatedCache | None = None
        self._layer, self._family, self._geometry, self._eigen = layer, family, geometry, eigen
        device = next(layer.parameters()).device
        (key_down, key_up), (value_down, value_up) = (
            [item.to(device, torch.float32).contiguous() for item in maps]
            for maps in (unfolded.key, unfolded.value)
        )
        if not eigen.projections.folds_keys:
            key_down = nn.Parameter(key_down)
        if not eigen.projections.folds_keys or eigen.key_mode.reconstructs_keys:
            key_up = _reconstruction(key_up)
        if not eigen.projections.folds_values:
            value_down, value_up = nn.Parameter(value_down), _reconstruction(value_up)
        self.key, self.value = (key_down, key_up), (value_down, value_up)
        maps = self.key, self.value
        compress(
            layer,
            family,
            geometry,
            eigen.key_mode,
            *maps,
            cache=self._through_cache,
            key_offset=unfolded.key_offset,
            value_offset=unfolded.value_offset,
        )

    def matrices(self) -> list[tuple[nn.Module, tuple[slice, ...]]]:
        """Projections with something folded into `weight`: the rows of each matrix in it."""
        family, projections = self._family, self._eigen.projections
        names = [family.q_proj, family.k_proj] if projections.folds_keys else []
        names += [family.v_proj, family.o_proj] if projections.folds_values else []
        ends = list(accumulate(self._geometry.qkv_sizes))
        starts = [0, *ends[:-1]]
        fused = (family.q_proj, family.k_proj, family.v_proj) if family.qkv_proj else ()
        rows: dict[str, tuple[slice, ...]] = {}
        for name in names:
            if name in fused:
                part = fused.index(name)
                found = rows.get(family.qkv_proj, ())
                rows[family.qkv_proj] = (*found, slice(starts[part], ends[part]))
            else:
                rows[name] = (slice(None),)
        attention = self._layer.get_submodule(family.attention)
        return [(attention.get_submodule(name), parts) for name, parts in rows.items()]

    def bases(self) -> list[nn.Parameter]:
        """The maps that the checkpoint stores."""
        return [item for item in (*self.key, *self.value) if isinstance(item, nn.Parameter)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors of this layer, by their names in the attention module."""
        key, value = ((down.double(), up.double()) for down, up in (self.key, self.value))
        stored = _ModuleTensors(self._layer)
        where = stored, self._family.attention, self._family, self._geometry
        return compressed_tensors(*where, self._eigen, LayerMaps(key, value))

    def _through_cache(self, part: Part, latents: torch.Tensor) -> torch.Tensor:
        return latents if self.cache is None else self.cache(part, latents)


class _ModuleTensors:
    """A module's parameters by name, as `fold.Tensors`; parametrized ones are computed."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def get(self, name: str) -> torch.Tensor:
        found: torch.Tensor = attrgetter(name)(self._module)
        return found

    def __contains__(self, name: str) -> bool:
        try:
            return attrgetter(name)(self._module) is not None
        except AttributeError:
            return False


def _reconstruction(basis: torch.Tensor) -> nn.Parameter:
    """A parameter whose zeros stay zeros in training: kernels do not read them."""
    present = basis != 0
    parameter = nn.Parameter(basis)
    parameter.register_hook(lambda gradient: gradient * present)
    return parameter
