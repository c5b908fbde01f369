"""What a model's KV cache will take and hold, from its configuration alone.

Pure arithmetic over `config.json`; nothing is loaded. The engine's pool is whole blocks, and so
is the estimate's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_eigen.checkpoint import (
    FORMAT_VERSION,
    EigenConfig,
    LayerRanks,
    foldable,
    parse_config,
    tensor_shapes,
)
from vllm_eigen.errors import UnsupportedModelError, UsageError
from vllm_eigen.families import Family, Geometry, family_of

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
"""By type name; every fp8 variant (fp8_e4m3, fp8_e5m2) takes one byte."""


@dataclass(frozen=True)
class Capacity:
    """What fits into the memory, in one of the two forms of the model."""

    weight_bytes: int
    pool_bytes: int
    """Memory less weights."""
    bytes_per_token: int
    tokens: int
    sequences: float
    """Sequences of full length at once."""


@dataclass(frozen=True)
class Estimate:
    """The same model, in the same memory, with and without compression."""

    architecture: str
    kv_ratio: float
    max_model_len: int
    uncompressed: Capacity
    compressed: Capacity


def estimate(
    config: Mapping[str, Any],
    memory: int,
    kv_ratio: float | None = None,
    kv_cache_dtype: str = "auto",
    max_model_len: int | None = None,
    block_size: int = 16,
    stored_bytes: int | None = None,
) -> Estimate:
    """Size a model, base or Eigen.

    Args:
        config: its `config.json`.
        memory: bytes for weights and KV cache together.
        kv_ratio: KV size to compress to, in elements; an Eigen model brings its own.
        kv_cache_dtype: element type of the compressed cache; the model's own by default. The
            uncompressed one is counted at the model's type.
        max_model_len: tokens of a full sequence; the model's longest by default.
        block_size: tokens a block.
        stored_bytes: bytes of the weight files, where known; else counted from `config`.

    Raises:
        UsageError: an argument is out of range, or the weights do not fit.
        UnsupportedModelError, CheckpointError: the configuration is of no use.
    """
    family = family_of(config)
    geometry = family.geometry(config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    element = element_bytes(dtype)
    eigen = _eigen(config, family, geometry, kv_ratio)
    full_length = max_model_len or _longest(config)
    plain_attention = _attention_elements(geometry)
    compressed = kv_ratio is not None or "eigen" in config
    small_attention = _eigen_elements(eigen, family, geometry) if compressed else plain_attention
    if stored_bytes is None:
        plain_weights = (_other_elements(config, geometry) + plain_attention) * element
    else:
        held = small_attention if "eigen" in config else plain_attention
        plain_weights = stored_bytes + (plain_attention - held) * element
    small_weights = plain_weights + (small_attention - plain_attention) * element
    cached = element if kv_cache_dtype == "auto" else element_bytes(kv_cache_dtype)

    def capacity(weights: int, bytes_per_token: int) -> Capacity:
        pool = memory - weights
        if pool <= 0:
            raise UsageError(
                f"the weights take {weights / 2**30:.2f} GiB, more than --memory; give more"
            )
        tokens = pool // (block_size * bytes_per_token) * block_size
        blocks = -(-full_length // block_size)
        return Capacity(weights, pool, bytes_per_token, tokens, tokens / (blocks * block_size))

    return Estimate(
        architecture=family.architecture,
        kv_ratio=eigen.kv_ratio,
        max_model_len=full_length,
        uncompressed=capacity(plain_weights, eigen.uncompressed_elements_per_token * element),
        compressed=capacity(small_weights, eigen.elements_per_token * cached),
    )


def element_bytes(dtype: str) -> int:
    """Bytes of an element of a torch or cache type.

    Raises:
        UsageError: the type is unknown.
    """
    name = dtype.removeprefix("torch.")
    found = ELEMENT_BYTES.get("fp8" if name.startswith("fp8") else name)
    if found is None:
        raise UsageError(f"element type {dtype} is unknown; known: {', '.join(ELEMENT_BYTES)}")
    return found


def _eigen(
    config: Mapping[str, Any], family: Family, geometry: Geometry, kv_ratio: float | None
) -> EigenConfig:
    """The checkpoint's own ranks, or ranks spread evenly to a ratio."""
    if "eigen" in config:
        if kv_ratio is not None:
            raise UsageError("the model is compressed already; drop --kv-ratio")
        return parse_config(config)
    ratio = 1.0 if kv_ratio is None else kv_ratio
    if not 0 < ratio <= 1:
        raise UsageError(f"--kv-ratio {ratio} is out of range; give 0 < R <= 1")
    total = round(ratio * 2 * geometry.head_size * geometry.num_layers)
    ranks = []
    for layer in range(geometry.num_layers):
        share = total * (layer + 1) // geometry.num_layers - total * layer // geometry.num_layers
        ranks.append(LayerRanks(rank_k=max(1, share - share // 2), rank_v=max(1, share // 2)))
    return EigenConfig(
        format_version=FORMAT_VERSION,
        key_mode=family.key_modes[0],
        projections=foldable(family, config, family.key_modes[0]),
        method="estimate",
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_size=geometry.head_size,
        layers=tuple(ranks),
        provenance={},
    )


def _longest(config: Mapping[str, Any]) -> int:
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        if config.get(name):
            return int(config[name])
    raise UsageError("config.json names no longest sequence; give --max-model-len")


def _attention_elements(geometry: Geometry) -> int:
    """Weights of the uncompressed attention projections, without biases."""
    heads = 2 * geometry.num_heads + 2 * geometry.num_kv_heads
    return geometry.num_layers * geometry.hidden_size * heads * geometry.head_size


def _eigen_elements(eigen: EigenConfig, family: Family, geometry: Geometry) -> int:
    """Weights of the compressed attention: projections, and bases where they are apart."""
    shapes = (shape for _, shape in tensor_shapes(eigen, family, geometry.hidden_size))
    own = sum(math.prod(shape) for shape in shapes)
    return own + (_attention_elements(geometry) if eigen.projections == "untouched" else 0)


def _other_elements(config: Mapping[str, Any], geometry: Geometry) -> int:
    """Weights outside the attention: embeddings, feed-forward layers, biases and norms."""
    hidden = geometry.hidden_size
    try:
        vocabulary = int(config["vocab_size"])
        wide = int(config.get("intermediate_size") or config.get("ffn_dim") or 0)
        wide = wide or int(config["expansion_ratio"]) * hidden
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"config.json: field {error} is missing or no number"
        ) from error
    model_type = str(config.get("model_type"))
    gated = model_type not in ("opt", "mpt")
    tied = bool(config.get("tie_word_embeddings", not gated))
    per_layer = (3 if gated else 2) * hidden * wide + 2 * hidden
    total = vocabulary * hidden * (1 if tied else 2) + hidden
    if model_type == "opt":
        narrow = int(config.get("word_embed_proj_dim") or hidden)
        total += (int(config["max_position_embeddings"]) + 2) * hidden + hidden
        total += vocabulary * (narrow - hidden) + (2 * narrow * hidden if narrow != hidden else 0)
        per_layer += 4 * hidden + wide + hidden + 2 * hidden
    return total + geometry.num_layers * per_layer
