# SPDX-License-Identifier: Apache-2.0
"""The stages of a calibration whose latents are coded.

    gradient pass -> bases and steps of every layer -> widths -> maps

Widths of all layers, keys and values are chosen together, from one budget of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_eigen.calibration.coding.budget import bytes_for
from vllm_eigen.calibration.coding.choice import Choice, choose
from vllm_eigen.calibration.coding.keys import KeyCodes, fit_keys
from vllm_eigen.calibration.coding.values import ValueCodes, fit_values
from vllm_eigen.calibration.gradient_layers import each_layer
from vllm_eigen.calibration.job import Job
from vllm_eigen.calibration.methods.basis import LayerMaps
from vllm_eigen.calibration.statistics.samples import LayerSamples
from vllm_eigen.calibration.target import Target
from vllm_eigen.calibration.truncated import TruncatedModel
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.checkpoint.config import LayerRanks


@dataclass(frozen=True)
class LayerCodes:
    """What the codes of one layer are made of."""

    key: KeyCodes
    value: ValueCodes


@dataclass(frozen=True)
class CodedAllocation:
    """Widths of all layers.

    Attributes:
        ranks: with their codes, one per layer.
        loss: foretold KL divergence a token.
    """

    ranks: tuple[LayerRanks, ...]
    loss: float

    def record(self) -> dict[str, Any]:
        """For the provenance, JSON-ready."""
        return {"rank_rule": "bits", "foretold_kl": float(f"{self.loss:.4g}")}


class CodedCalibrator:
    """Codes of a job's layers, made when it is constructed, and compressed models made of them.

    Beside layers that are kept vLLM gives all compressed layers pages of one size, which is that of
    the largest: they get equal bytes then. Otherwise all layers share one budget.

    Raises:
        UsageError: the model's heads cannot be coded.
        InputError: a layer's output or gradient is not finite.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._layers = each_layer(job, self._kept, self._make)

    def allocate(self, target: Target) -> CodedAllocation:
        """Widths of least foretold loss for a KV ratio.

        Raises:
            UsageError: the target is not a KV ratio, or the ratio is out of reach.
        """
        ratio = target.ratio_of_coded()
        model = self._job.model
        budget = bytes_for(ratio, model.source.geometry.head_size)
        parts = [(layer.key.choices(), layer.value.choices) for layer in self._layers]
        if len(self._layers) < model.num_layers:
            found = [item for part in parts for item in choose(part, budget)]
        else:
            flat = [choices for part in parts for choices in part]
            found = choose(flat, budget * len(parts))
        pairs = zip(found[::2], found[1::2], strict=True)
        return CodedAllocation(
            tuple(_ranks(key, value) for key, value in pairs), sum(item.loss for item in found)
        )

    def compress(self, ranks: Sequence[LayerRanks]) -> TruncatedModel:
        """The model with its latents coded."""
        maps = []
        for layer, rank in zip(self._layers, ranks, strict=True):
            assert rank.key_code is not None
            assert rank.value_code is not None
            key, offset = layer.key.maps(rank.key_code)
            maps.append(LayerMaps(key, layer.value.maps(rank.value_code), key_offset=offset))
        return TruncatedModel(self._job.model, tuple(maps), tuple(ranks), self._job.recipe.key_mode)

    def _make(self, index: int, samples: LayerSamples) -> LayerCodes:
        return self._keep(index, self._fit(index, samples))

    def _fit(self, index: int, samples: LayerSamples) -> LayerCodes:
        cached = self._job.cached(samples)
        return LayerCodes(
            fit_keys(cached.key, cached.key_gradient),
            fit_values(cached.value, cached.value_gradient),
        )

    def _kept(self, index: int) -> LayerCodes | None:
        """What an interrupted run left of a layer."""
        tensors = self._job.state.read_tensors(_name(index))
        record = self._job.state.read_json(_name(index))
        return None if tensors is None or record is None else _layer(tensors, record)

    def _keep(self, index: int, layer: LayerCodes) -> LayerCodes:
        """Keep a layer's result; returns it as `_kept` will."""
        state = self._job.state
        tensors = {f"key.{name}": getattr(layer.key, name) for name in _KEY}
        tensors |= {f"value.{name}": getattr(layer.value, name) for name in ("vectors", "energy")}
        record = [
            {"code": item.code.model_dump(), "loss": item.loss} for item in layer.value.choices
        ]
        kept = state.write_tensors(_name(index), tensors)
        state.write_json(_name(index), record)
        return _layer(kept, record)


_KEY = ("encoder", "decoder", "offset", "steps", "losses")


def _layer(tensors: dict[str, torch.Tensor], record: Any) -> LayerCodes:
    choices = tuple(Choice(Code(**item["code"]), item["loss"]) for item in record)
    return LayerCodes(
        KeyCodes(*(tensors[f"key.{name}"] for name in _KEY)),
        ValueCodes(tensors["value.vectors"], tensors["value.energy"], choices),
    )


def _ranks(key: Choice, value: Choice) -> LayerRanks:
    return LayerRanks(
        rank_k=key.code.rank, rank_v=value.code.rank, key_code=key.code, value_code=value.code
    )


def _name(layer: int) -> str:
    return f"codes-{layer:04d}"
