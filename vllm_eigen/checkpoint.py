"""The Eigen checkpoint: the one definition of the format, for the writer and for the reader.

A checkpoint is an ordinary Hugging Face folder whose `config.json` keeps the base `model_type`,
names the Eigen architecture, and carries an `eigen` section (`EigenConfig`). Per layer it holds

    q_proj     [num_heads * rank_k, hidden]              folded
               [num_heads * head_size, hidden]           pre-rope (unchanged)
    k_proj     [num_latent_heads * rank_k, hidden]
    v_proj     [num_latent_heads * rank_v, hidden]
    o_proj     [hidden, num_heads * rank_v]
    key_basis  [num_kv_heads, rank_k, head_size]         pre-rope only: k_hat = k' key_basis

Calibration turns the latents so that fast planes of a pre-rope key need few of them; what is zero
of key_basis need not be multiplied (`kernels/planes.py`).

With `num_latent_heads = num_kv_heads / head_group`; biases follow their projection. Everything
else is the base model's. That is `projections` = `folded`. Where keys pass a norm or the rotary
embedding (post-rope mode) before they are cached, no basis can be multiplied into what makes them:
with `values-folded` q_proj and k_proj are the base model's, and the first two of the tensors below
stand beside them. Where values pass a clip too, or the base weights are to stay as they are,
`projections` is `untouched`: q/k/v/o_proj are the base model's, and a layer adds all four

    key_encoder    [num_latent_heads, head_group * head_size, rank_k]   k' = k key_encoder
    key_basis      [num_kv_heads, rank_k, head_size]                    k_hat = k' key_basis
    value_encoder  [num_latent_heads, head_group * head_size, rank_v]   v' = v value_encoder
    value_basis    [num_kv_heads, rank_v, head_size]                    o = o' value_basis

A bases-only checkpoint holds nothing else: `eigen.json` (the `eigen` section and the base model it
belongs to) and `bases.safetensors` with those four tensors a layer, named as above. It is applied
over the base model as it is, quantized or adapted.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_eigen.errors import CheckpointError
from vllm_eigen.families import Family, Geometry, KeyMode, family_of

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
BASES_CONFIG_FILE = "eigen.json"
BASES_FILE = "bases.safetensors"
KEY_ENCODER = "key_encoder"
KEY_BASIS = "key_basis"
VALUE_ENCODER = "value_encoder"
VALUE_BASIS = "value_basis"

Projections = Literal["folded", "values-folded", "untouched"]
"""Which bases are multiplied into the projections; others stand beside them. Most folded first."""


class LayerRanks(BaseModel):
    """Cached width of one layer, in elements per latent head and token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank_k: int = Field(ge=1, description="columns of the key basis")
    rank_v: int = Field(ge=1, description="columns of the value basis")
    k_scale: float = Field(default=1.0, gt=0, description="an fp8 cache stores k' / k_scale")
    v_scale: float = Field(default=1.0, gt=0, description="an fp8 cache stores v' / v_scale")


class EigenConfig(BaseModel):
    """The `eigen` section of `config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(description="version of this format")
    key_mode: KeyMode = Field(description="what the key cache holds")
    projections: Projections = Field(
        default="folded", description="which bases are multiplied into the projections"
    )
    method: str = Field(description="name of the calibration method that chose the bases")
    num_heads: int = Field(ge=1, description="query heads")
    num_kv_heads: int = Field(ge=1, description="KV heads of the base model")
    head_size: int = Field(ge=1, description="head size of the base model; the softmax scale's")
    head_group: int = Field(default=1, ge=1, description="KV heads that share one latent head")
    layers: tuple[LayerRanks, ...] = Field(min_length=1, description="ranks, first layer first")
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
        full = self.head_size * self.head_group
        for index, layer in enumerate(self.layers):
            if layer.rank_k > full or layer.rank_v > full:
                raise ValueError(
                    f"layer {index}: ranks ({layer.rank_k}, {layer.rank_v}) exceed the full {full}"
                )
        return self

    @property
    def num_latent_heads(self) -> int:
        """Heads in the cache."""
        return self.num_kv_heads // self.head_group

    @property
    def elements_per_token(self) -> int:
        """Cached elements a token, over all layers."""
        return self.num_latent_heads * sum(layer.rank_k + layer.rank_v for layer in self.layers)

    @property
    def uncompressed_elements_per_token(self) -> int:
        """Cached elements a token of the base model, over all layers."""
        return 2 * self.num_kv_heads * self.head_size * len(self.layers)

    @property
    def kv_ratio(self) -> float:
        """KV-cache bytes relative to the base model at the same element type."""
        return self.elements_per_token / self.uncompressed_elements_per_token


def foldable(family: Family, config: Mapping[str, Any], key_mode: KeyMode) -> Projections:
    """The most that can be folded: nothing passes a clip, and no keys a norm or a rotation.

    Args:
        config: the base model's `config.json`.
    """
    if family.clips(config):
        return "untouched"
    return "values-folded" if family.k_norm or key_mode == "post-rope" else "folded"


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
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: eigen format version {version!r} is unknown, this release reads "
            f"{FORMAT_VERSION}; calibrate again or install the release that wrote it"
        )
    try:
        eigen = EigenConfig.model_validate(section)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {_first_problem(error)}") from error
    family = family_of(config)
    _check_fit(eigen, family, family.geometry(config), where)
    most = foldable(family, config, eigen.key_mode)
    order = get_args(Projections)
    if order.index(eigen.projections) < order.index(most):
        raise CheckpointError(
            f"{where}: projections {eigen.projections!r} cannot be, keys of this model allow "
            f"{most!r} in key mode {eigen.key_mode}; calibrate again"
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


class BasesConfig(BaseModel):
    """`eigen.json` of a bases-only checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = Field(description="architecture of the base model")
    base: str = Field(description="base model the bases were calibrated on, hub id or folder name")
    eigen: dict[str, Any] = Field(description="the eigen section, see EigenConfig")


def serving_overrides(folder: Path, base_config: Mapping[str, Any]) -> dict[str, Any]:
    """What to override in a base model's `config.json` so that it is served with these bases.

    Args:
        folder: a bases-only checkpoint.
        base_config: the base model's `config.json`.

    Raises:
        CheckpointError: the bases are damaged or belong to a model of another shape.
    """
    path = Path(folder) / BASES_CONFIG_FILE
    try:
        found = BasesConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; make bases with `vllm-eigen calibrate "
            "--bases-only`"
        ) from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_problem(error)}") from error
    family = family_of(base_config)
    if found.architecture != family.architecture:
        raise CheckpointError(
            f"{path}: the bases are for {found.architecture} ({found.base}), the model is "
            f"{family.architecture}"
        )
    section = {**found.eigen, "bases": str((Path(folder) / BASES_FILE).resolve())}
    overrides = {"architectures": [family.eigen_architecture], "eigen": section}
    eigen = parse_config({**base_config, **overrides}, str(path))
    _check_shapes(
        folder, eigen, family, family.geometry(base_config).hidden_size, _stored_shapes(folder)
    )
    return overrides


def tensor_shapes(
    eigen: EigenConfig, family: Family, hidden_size: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every attention tensor the format fixes, layer by layer."""
    latent_heads = eigen.num_latent_heads
    for index, ranks in enumerate(eigen.layers):
        path = family.attention_path(index)
        if eigen.projections != "untouched":
            query_size, key_size = projected_sizes(eigen, ranks)
            yield f"{path}.{family.q_proj}.weight", (eigen.num_heads * query_size, hidden_size)
            yield f"{path}.{family.k_proj}.weight", (latent_heads * key_size, hidden_size)
            yield f"{path}.{family.v_proj}.weight", (latent_heads * ranks.rank_v, hidden_size)
            yield f"{path}.{family.o_proj}.weight", (hidden_size, eigen.num_heads * ranks.rank_v)
        for name, shape in basis_shapes(eigen, ranks).items():
            yield f"{path}.{name}", shape


def projected_sizes(eigen: EigenConfig, ranks: LayerRanks) -> tuple[int, int]:
    """What a layer's projections make of the hidden state, not being untouched.

    Returns:
        The width of a query head, and of the keys of a latent head.
    """
    if eigen.projections == "values-folded":
        return eigen.head_size, eigen.head_group * eigen.head_size
    return ranks.rank_k if eigen.key_mode == "folded" else eigen.head_size, ranks.rank_k


def basis_shapes(eigen: EigenConfig, ranks: LayerRanks) -> dict[str, tuple[int, int, int]]:
    """Shapes of the bases that stand beside a layer's projections, by name."""
    full = eigen.head_group * eigen.head_size
    shapes = {}
    if eigen.projections != "folded":
        shapes[KEY_ENCODER] = eigen.num_latent_heads, full, ranks.rank_k
    if eigen.projections != "folded" or eigen.key_mode == "pre-rope":
        shapes[KEY_BASIS] = eigen.num_kv_heads, ranks.rank_k, eigen.head_size
    if eigen.projections == "untouched":
        shapes[VALUE_ENCODER] = eigen.num_latent_heads, full, ranks.rank_v
        shapes[VALUE_BASIS] = eigen.num_kv_heads, ranks.rank_v, eigen.head_size
    return shapes


def validate(folder: Path) -> EigenConfig:
    """Check a whole checkpoint: config, shard files, and the shape of every attention tensor.

    Reads only the headers of the weight files.

    Raises:
        CheckpointError, UnsupportedModelError: what is wrong, in which file or tensor.
    """
    folder = Path(folder)
    config, eigen = read_config(folder)
    family = family_of(config)
    hidden_size = family.geometry(config).hidden_size
    _check_shapes(folder, eigen, family, hidden_size, _stored_shapes(folder))
    return eigen


def _check_shapes(
    folder: Path,
    eigen: EigenConfig,
    family: Family,
    hidden_size: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Every tensor the format fixes is stored in the shape the ranks ask for."""
    for name, expected in tensor_shapes(eigen, family, hidden_size):
        stored = shapes.get(name, shapes.get(name.removeprefix("model.")))
        if stored is None:
            raise CheckpointError(f"{folder}: tensor {name} is missing; calibrate again")
        if stored != expected:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {list(stored)}, the ranks in config.json ask "
                f"for {list(expected)}; calibrate again"
            )


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in the folder's safetensors files."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from error
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file; calibrate again")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is missing or damaged ({error}); calibrate again or copy it again"
            ) from error
    return shapes


def _check_fit(eigen: EigenConfig, family: Family, geometry: Geometry, where: str) -> None:
    """The eigen section must describe the model that the rest of the config describes."""
    pairs = (
        ("num_heads", eigen.num_heads, geometry.num_heads),
        ("num_kv_heads", eigen.num_kv_heads, geometry.num_kv_heads),
        ("head_size", eigen.head_size, geometry.head_size),
        ("number of layers", len(eigen.layers), geometry.num_layers),
    )
    for name, found, expected in pairs:
        if found != expected:
            raise CheckpointError(
                f"{where}: eigen {name} is {found}, the model has {expected}; calibrate again"
            )
    if eigen.key_mode not in family.key_modes:
        raise CheckpointError(
            f"{where}: key mode {eigen.key_mode} does not fit {family.architecture} "
            f"({', '.join(family.key_modes)})"
        )


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in ("eigen", *first["loc"]))
    return f"{place}: {first['msg']}"
