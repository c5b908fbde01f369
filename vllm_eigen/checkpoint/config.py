# SPDX-License-Identifier: Apache-2.0
"""The configuration of an Eigen checkpoint: the one definition, for the writer and for the reader.

A checkpoint is an ordinary Hugging Face folder whose `config.json` keeps the base `model_type`,
names the Eigen architecture, and carries an `eigen` section (`EigenConfig`). The tensors beside it
are listed in `shapes`, whole folders are checked by `validate`.

A bases-only checkpoint holds nothing of the model: `eigen.json` (`BasesConfig`) and
`bases.safetensors`. It is applied over the base model as it is, quantized or adapted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.checkpoint.families import Family, family_of
from vllm_eigen.checkpoint.modes import KeyMode, Projections
from vllm_eigen.common.errors import CheckpointError, UsageError

FORMAT_VERSION = 4
READABLE_VERSIONS = (1, 2, 3, 4)
CONFIG_FILE = "config.json"
BASES_CONFIG_FILE = "eigen.json"
BASES_FILE = "bases.safetensors"


class LayerRanks(BaseModel):
    """Cached width of one layer: elements per latent head and token, and their bits if coded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank_k: int = Field(ge=1, description="columns of the key basis")
    rank_v: int = Field(ge=1, description="columns of the value basis")
    k_scale: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="an fp8 cache stores k' / k_scale"
    )
    v_scale: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="an fp8 cache stores v' / v_scale"
    )
    key_code: Code | None = Field(default=None, description="widths of coded keys, rank_k of them")
    value_code: Code | None = Field(default=None, description="the same of values")

    @model_validator(mode="after")
    def _check(self) -> LayerRanks:
        if (self.key_code is None) != (self.value_code is None):
            raise ValueError("key_code and value_code go together; one is missing")
        for name, rank, code in (
            ("rank_k", self.rank_k, self.key_code),
            ("rank_v", self.rank_v, self.value_code),
        ):
            if code is not None and code.rank != rank:
                raise ValueError(f"{name} is {rank}, its code has {code.rank} directions")
        return self

    @property
    def coded(self) -> bool:
        """Whether the cache holds codes of the latents."""
        return self.key_code is not None

    def key_bytes(self, element_bytes: int) -> int:
        """Bytes of one latent head and token's key; `element_bytes` is for those not coded."""
        return element_bytes * self.rank_k if self.key_code is None else self.key_code.num_bytes

    def value_bytes(self, element_bytes: int) -> int:
        """Bytes of one latent head and token's value."""
        return element_bytes * self.rank_v if self.value_code is None else self.value_code.num_bytes

    def num_bytes(self, element_bytes: int) -> int:
        """Bytes of one latent head and token, key and value."""
        return self.key_bytes(element_bytes) + self.value_bytes(element_bytes)


class EigenConfig(BaseModel):
    """The `eigen` section of `config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(description="version of this format")
    key_mode: KeyMode = Field(description="what the key cache holds")
    projections: Projections = Field(
        default=Projections.FOLDED, description="which bases are multiplied into the projections"
    )
    method: str = Field(description="name of the calibration method that chose the bases")
    num_heads: int = Field(ge=1, description="query heads")
    num_kv_heads: int = Field(ge=1, description="KV heads of the base model")
    head_size: int = Field(ge=1, description="head size of the base model; the softmax scale's")
    head_group: int = Field(default=1, ge=1, description="KV heads that share one latent head")
    layers: tuple[LayerRanks, ...] = Field(
        min_length=1, description="ranks of the compressed layers, first layer first"
    )
    kept_layers: tuple[int, ...] = Field(
        default=(), description="indices of layers that are as the base model has them"
    )
    key_offset: bool = Field(
        default=False, description="k' = (k - o) U with an offset o of each KV head"
    )
    value_offset: bool = Field(default=False, description="the same of values")
    bases: str | None = Field(
        default=None, description="bases.safetensors to load beside the weights; set when serving"
    )
    provenance: dict[str, Any] = Field(description="how, when and from what it was made")

    @model_validator(mode="after")
    def _check(self) -> EigenConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} KV heads")
        if self.num_kv_heads % self.head_group:
            raise ValueError(f"head_group {self.head_group} does not divide {self.num_kv_heads}")
        if sorted(set(self.kept_layers)) != [
            index for index in self.kept_layers if 0 <= index < self.num_layers
        ]:
            raise ValueError(f"kept_layers {list(self.kept_layers)} are not ascending indices")
        full = self.head_size * self.head_group
        for index, layer in zip(self.layer_indices, self.layers, strict=True):
            if layer.rank_k > full or layer.rank_v > full:
                raise ValueError(
                    f"layer {index}: ranks ({layer.rank_k}, {layer.rank_v}) exceed the full {full}"
                )
            if layer.coded != self.coded:
                raise ValueError(f"layer {index}: either all layers are coded or none is")
        return self

    @property
    def num_layers(self) -> int:
        """Layers of the model, compressed or kept."""
        return len(self.layers) + len(self.kept_layers)

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Where in the model each of `layers` is."""
        kept = set(self.kept_layers)
        return tuple(index for index in range(self.num_layers) if index not in kept)

    @property
    def num_latent_heads(self) -> int:
        """Heads in the cache."""
        return self.num_kv_heads // self.head_group

    @property
    def coded(self) -> bool:
        """Whether the cache holds codes: its size does not depend on an element type then."""
        return self.layers[0].coded

    def bytes_per_token(self, element_bytes: int) -> int:
        """Cached bytes a token, over the compressed layers.

        Args:
            element_bytes: bytes of a latent's element in a cache that is not coded.
        """
        return self.num_latent_heads * sum(layer.num_bytes(element_bytes) for layer in self.layers)

    def uncompressed_bytes_per_token(self, element_bytes: int) -> int:
        """The same of the base model, over the layers that are compressed."""
        return 2 * self.num_kv_heads * self.head_size * len(self.layers) * element_bytes

    def kept_bytes_per_token(self, element_bytes: int) -> int:
        """Cached bytes a token of the layers that are kept, inside their windows."""
        return 2 * self.num_kv_heads * self.head_size * len(self.kept_layers) * element_bytes

    @property
    def kv_ratio(self) -> float:
        """KV-cache bytes of the compressed layers relative to the base model's: of 16 bits where
        the latents are coded, of the same element type otherwise."""
        return self.bytes_per_token(2) / self.uncompressed_bytes_per_token(2)


class BasesConfig(BaseModel):
    """`eigen.json` of a bases-only checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = Field(description="architecture of the base model")
    base: str = Field(description="base model the bases were calibrated on, hub id or folder name")
    eigen: dict[str, Any] = Field(description="the eigen section, see EigenConfig")


def foldable(family: Family, config: Mapping[str, Any], key_mode: KeyMode) -> Projections:
    """The most that can be folded: nothing passes a clip, and no keys a norm or a rotation.

    Args:
        config: the base model's `config.json`.
    """
    if family.clips(config):
        return Projections.UNTOUCHED
    if family.k_norm or key_mode.caches_rotated_keys:
        return Projections.VALUES_FOLDED
    return Projections.FOLDED


def check_cache_dtype(eigen: EigenConfig, kv_cache_dtype: str) -> None:
    """Refuse an element type for a cache of codes, which has bytes of its own.

    Raises:
        UsageError: the type is not `auto`.
    """
    if eigen.coded and kv_cache_dtype != "auto":
        raise UsageError(
            f"--kv-cache-dtype {kv_cache_dtype} does not fit this checkpoint, whose cache holds "
            "coded latents; leave it at auto"
        )


def parse_config(config: Mapping[str, Any], where: str = CONFIG_FILE) -> EigenConfig:
    """Validate the `eigen` section of a `config.json` dictionary against the rest of it.

    Raises:
        CheckpointError: the section is missing, malformed, of an unknown version, or does not fit.
        UnsupportedModelError: the architecture has no description.
    """
    section = config.get("eigen")
    if not isinstance(section, Mapping):
        raise CheckpointError(
            f"{where} has no 'eigen' section: not an Eigen checkpoint; "
            "make one with `vllm-eigen calibrate`"
        )
    version = section.get("format_version")
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{where}: eigen format version {version!r} is unknown, this release reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}; calibrate again or install the release "
            "that wrote it"
        )
    try:
        eigen = EigenConfig.model_validate(section)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {first_problem(error)}") from error
    family = family_of(config)
    _check_fit(eigen, family, config, where)
    most = foldable(family, config, eigen.key_mode)
    if eigen.projections.folds_more_than(most):
        raise CheckpointError(
            f"{where}: projections '{eigen.projections}' cannot be, keys of this model allow "
            f"'{most}' in key mode {eigen.key_mode}; calibrate again"
        )
    return eigen


def read_config(folder: Path) -> tuple[dict[str, Any], EigenConfig]:
    """Read and validate `folder/config.json`; returns the whole dictionary and its eigen section.

    Raises:
        CheckpointError, UnsupportedModelError: see `parse_config`.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config, parse_config(config, str(path))


def _check_fit(eigen: EigenConfig, family: Family, config: Mapping[str, Any], where: str) -> None:
    """The eigen section must describe the model that the rest of the config describes."""
    geometry = family.geometry(config)
    pairs = (
        ("num_heads", eigen.num_heads, geometry.num_heads),
        ("num_kv_heads", eigen.num_kv_heads, geometry.num_kv_heads),
        ("head_size", eigen.head_size, geometry.head_size),
        ("number of layers", eigen.num_layers, geometry.num_layers),
    )
    for name, found, wanted in pairs:
        if found != wanted:
            raise CheckpointError(
                f"{where}: eigen {name} is {found}, the model has {wanted}; calibrate again"
            )
    expected = family.compressed_layers(config)
    if eigen.layer_indices != expected:
        raise CheckpointError(
            f"{where}: eigen compresses layers {list(eigen.layer_indices)}, of this model "
            f"{list(expected)} can be; calibrate again"
        )
    if eigen.key_mode not in family.key_modes:
        raise CheckpointError(
            f"{where}: key mode {eigen.key_mode} does not fit {family.architecture} "
            f"({', '.join(family.key_modes)})"
        )


def first_problem(error: ValidationError) -> str:
    """The first finding of pydantic on one line: field, then what is wrong with it."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in ("eigen", *first["loc"]))
    return f"{place}: {first['msg']}"
