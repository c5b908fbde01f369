# SPDX-License-Identifier: Apache-2.0
"""Size and capacity of a model's KV cache, estimated from its configuration alone.

Pure arithmetic over `config.json`; nothing is loaded. Capacity counts whole blocks, as the
engine's pool does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_eigen.checkpoint.codes import FULL_BITS, SCALE_BYTES, Code
from vllm_eigen.checkpoint.config import (
    FORMAT_VERSION,
    EigenConfig,
    LayerRanks,
    check_cache_dtype,
    foldable,
    parse_config,
)
from vllm_eigen.checkpoint.families import Family, Geometry, family_of
from vllm_eigen.checkpoint.pages import MixedCache, Pages
from vllm_eigen.checkpoint.shapes import tensor_shapes
from vllm_eigen.common.errors import UnsupportedModelError, UsageError

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
"""By type name; every fp8 variant (fp8_e4m3, fp8_e5m2) takes one byte."""
_NAMES = ((8, "eight"), (4, "four"), (2, "two"), (0, ""))
_STEP = 16
"""Directions of one width come in multiples that fill units of every width."""


@dataclass(frozen=True)
class Capacity:
    """What the memory holds, for the model either compressed or not."""

    weight_bytes: int
    pool_bytes: int
    """Memory minus weights."""
    bytes_per_token: int
    """Of a model with layers that are kept: bytes of a sequence of full length, by its tokens."""
    tokens: int
    """Of sequences of full length."""
    sequences: float
    """Sequences of full length at once."""


@dataclass(frozen=True)
class Estimate:
    """The same model, in the same memory, with and without compression."""

    architecture: str
    kv_ratio: float
    """Of the layers that are compressed."""
    pool_ratio: float
    """Of all layers: pool bytes of a sequence of full length relative to the base model's."""
    kept_layers: int
    max_model_len: int
    uncompressed: Capacity
    compressed: Capacity


def estimate(
    config: Mapping[str, Any],
    memory: int,
    *,
    kv_ratio: float | None = None,
    kv_bits: float | None = None,
    kv_cache_dtype: str = "auto",
    max_model_len: int | None = None,
    block_size: int = 16,
    in_flight: int = 4096,
    stored_bytes: int | None = None,
) -> Estimate:
    """Estimate a model, base or Eigen.

    Args:
        config: its `config.json`.
        memory: bytes for weights and KV cache together.
        kv_ratio: KV size to compress to, relative to the base model at its own type; an Eigen
            model has its own.
        kv_bits: bytes of coded latents instead, in bits a number of the base model's cache, token
            scales included: half for keys and half for values, the same widths in every layer.
            `calibrate --kv-bits` spends as much, over layers and directions as it pays.
        kv_cache_dtype: element type of the compressed cache; the model's own by default. The
            uncompressed cache is counted at the model's type. Coded latents allow no other.
        max_model_len: tokens of a full sequence; the model's maximum by default.
        block_size: tokens per block.
        in_flight: tokens scheduled and not yet settled: `--max-num-batched-tokens`, with
            asynchronous scheduling twice. They count beside a window.
        stored_bytes: bytes of the weight files, where known; else counted from `config`.

    Raises:
        UsageError: an argument is out of range, or the weights do not fit.
        UnsupportedModelError, CheckpointError: the configuration cannot be used.
    """
    family = family_of(config)
    geometry = family.geometry(config)
    element_size = element_bytes(str(config.get("dtype") or config.get("torch_dtype") or "float16"))
    cached_size = element_size if kv_cache_dtype == "auto" else element_bytes(kv_cache_dtype)
    compressed_layers = family.compressed_layers(config)
    eigen = _eigen_config(config, family, geometry, compressed_layers, kv_ratio, kv_bits)
    check_cache_dtype(eigen, kv_cache_dtype)
    max_model_len = max_model_len or _max_positions(config)
    base_attention = _attention_elements(geometry)
    if "eigen" in config or kv_ratio is not None or kv_bits is not None:
        attention = _eigen_elements(eigen, family, geometry)
    else:
        attention = base_attention
    if stored_bytes is None:
        base_weights = (_other_elements(config, geometry) + base_attention) * element_size
    else:
        stored_attention = attention if "eigen" in config else base_attention
        base_weights = stored_bytes + (base_attention - stored_attention) * element_size
    weights = base_weights + (attention - base_attention) * element_size

    def pool_of(weight_bytes: int) -> int:
        pool = memory - weight_bytes
        if pool <= 0:
            raise UsageError(
                f"the weights take {weight_bytes / 2**30:.2f} GiB, more than --memory; give more"
            )
        return pool

    def capacity(weight_bytes: int, bytes_per_token: int) -> Capacity:
        pool = pool_of(weight_bytes)
        tokens = pool // (block_size * bytes_per_token) * block_size
        sequence_tokens = -(-max_model_len // block_size) * block_size
        return Capacity(weight_bytes, pool, bytes_per_token, tokens, tokens / sequence_tokens)

    def mixed_capacity(weight_bytes: int, pages: Pages) -> Capacity:
        pool = pool_of(weight_bytes)
        sequences = pool // pages.block_bytes / pages.sequence_blocks
        per_token = -(-pages.sequence_bytes // max_model_len)
        tokens = int(sequences * max_model_len)
        return Capacity(weight_bytes, pool, per_token, tokens, sequences)

    def mixed_cache(size: int) -> MixedCache:
        return MixedCache(
            compressed_layers=len(eigen.layers),
            kept_layers=len(eigen.kept_layers),
            kept_bytes=2 * geometry.num_kv_heads * geometry.head_size * size,
            window=int(config["sliding_window"]),
            in_flight=in_flight,
            max_model_len=max_model_len,
        )

    if eigen.kept_layers:
        largest = max(layer.num_bytes(cached_size) for layer in eigen.layers)
        base_pages = mixed_cache(element_size).base_pages(block_size)
        pages = mixed_cache(cached_size).pages(block_size, eigen.num_latent_heads * largest)
        uncompressed = mixed_capacity(base_weights, base_pages)
        compressed = mixed_capacity(weights, pages)
        pool_ratio = pages.sequence_bytes / base_pages.sequence_bytes
    else:
        uncompressed = capacity(base_weights, eigen.uncompressed_bytes_per_token(element_size))
        compressed = capacity(weights, eigen.bytes_per_token(cached_size))
        pool_ratio = compressed.bytes_per_token / uncompressed.bytes_per_token
    return Estimate(
        architecture=family.architecture,
        kv_ratio=eigen.kv_ratio,
        pool_ratio=pool_ratio,
        kept_layers=len(eigen.kept_layers),
        max_model_len=max_model_len,
        uncompressed=uncompressed,
        compressed=compressed,
    )


def element_bytes(dtype: str) -> int:
    """Bytes of an element of a torch or cache type.

    Raises:
        UsageError: the type is unknown.
    """
    name = dtype.removeprefix("torch.")
    size = ELEMENT_BYTES.get("fp8" if name.startswith("fp8") else name)
    if size is None:
        raise UsageError(f"element type {dtype} is unknown; known: {', '.join(ELEMENT_BYTES)}")
    return size


def _eigen_config(
    config: Mapping[str, Any],
    family: Family,
    geometry: Geometry,
    compressed_layers: tuple[int, ...],
    kv_ratio: float | None,
    kv_bits: float | None,
) -> EigenConfig:
    """The checkpoint's own, or the same ranks or codes in every layer as asked for."""
    if "eigen" in config:
        if kv_ratio is not None or kv_bits is not None:
            raise UsageError("the model is compressed already; drop --kv-ratio and --kv-bits")
        return parse_config(config)
    if kv_ratio is not None and kv_bits is not None:
        raise UsageError("give one of --kv-ratio and --kv-bits")
    if kv_bits is not None:
        layers = [_coded_layer(geometry.head_size, kv_bits)] * len(compressed_layers)
    else:
        ratio = 1.0 if kv_ratio is None else kv_ratio
        layers = _plain_layers(geometry.head_size, len(compressed_layers), ratio)
    return EigenConfig(
        format_version=FORMAT_VERSION,
        key_mode=family.key_modes[0],
        projections=foldable(family, config, family.key_modes[0]),
        method="estimate",
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_size=geometry.head_size,
        layers=tuple(layers),
        kept_layers=tuple(
            index for index in range(geometry.num_layers) if index not in compressed_layers
        ),
        provenance={},
    )


def _coded_layer(head_size: int, bits: float) -> LayerRanks:
    """A layer whose latents take so many bits a number of the uncompressed head, or a little less.

    Raises:
        UsageError: no code is that small or large, or fits the head size.
    """
    half = int(bits * head_size) // 8
    try:
        if bits > FULL_BITS:
            raise ValueError
        key = Code(**_counts(head_size, half))
        value = Code(**_counts(head_size, half - SCALE_BYTES), token_scale=True)
        if value.rank < head_size:
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"--kv-bits {bits:g} does not fit heads of {head_size}; they are a multiple of "
            f"{_STEP}, and bits lie between 2.5 and {FULL_BITS}"
        ) from error
    return LayerRanks(rank_k=key.rank, rank_v=value.rank, key_code=key, value_code=value)


def _counts(head_size: int, num_bytes: int) -> dict[str, int]:
    """Directions of two neighbouring widths that fill the bytes."""
    for (high, name), (low, lower) in itertools.pairwise(_NAMES):
        if (left := 8 * num_bytes - low * head_size) >= 0:
            count = min(head_size, left // (high - low)) // _STEP * _STEP
            rest = {lower: head_size - count} if low else {}
            return {name: count, **rest}
    raise ValueError


def _plain_layers(head_size: int, count: int, ratio: float) -> list[LayerRanks]:
    """Layers of equal ranks that come to the ratio."""
    if not 0 < ratio <= 1:
        raise UsageError(f"--kv-ratio {ratio} is out of range; give 0 < R <= 1")
    total = round(ratio * 2 * head_size * count)
    ranks = []
    for layer in range(count):  # equal up to rounding; the sum is exact
        rank = total * (layer + 1) // count - total * layer // count
        ranks.append(LayerRanks(rank_k=max(1, rank - rank // 2), rank_v=max(1, rank // 2)))
    return ranks


def _max_positions(config: Mapping[str, Any]) -> int:
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        if config.get(name):
            return int(config[name])
    raise UsageError("config.json has no maximum sequence length; give --max-model-len")


def _attention_elements(geometry: Geometry) -> int:
    """Elements of the uncompressed attention projections, without biases."""
    heads = 2 * geometry.num_heads + 2 * geometry.num_kv_heads
    return geometry.num_layers * geometry.hidden_size * heads * geometry.head_size


def _eigen_elements(eigen: EigenConfig, family: Family, geometry: Geometry) -> int:
    """Elements of the compressed attention: projections, and bases that are not folded."""
    shapes = (shape for _, shape in tensor_shapes(eigen, family, geometry.hidden_size))
    eigen_tensors = sum(math.prod(shape) for shape in shapes)
    kept = len(eigen.kept_layers) if eigen.projections.folds_values else eigen.num_layers
    return eigen_tensors + _attention_elements(geometry) * kept // eigen.num_layers


def _other_elements(config: Mapping[str, Any], geometry: Geometry) -> int:
    """Elements outside the attention: embeddings, feed-forward layers, biases and norms."""
    hidden = geometry.hidden_size
    model_type = str(config.get("model_type"))
    gated = model_type not in ("opt", "mpt", "starcoder2")
    try:
        vocab_size = int(config["vocab_size"])
        intermediate = int(config.get("intermediate_size") or config.get("ffn_dim") or 0)
        intermediate = intermediate or int(config["expansion_ratio"]) * hidden
        mlps = _mlp_elements(config, geometry, (3 if gated else 2) * hidden * intermediate)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"config.json: field {error} is missing or no number"
        ) from error
    gemma = model_type.startswith("gemma")
    # What transformers takes where the configuration does not say.
    tied = bool(config.get("tie_word_embeddings", gemma or not gated))
    norms = 4 * hidden + 2 * geometry.head_size if gemma else 2 * hidden
    per_layer = norms
    total = mlps + vocab_size * hidden * (1 if tied else 2) + hidden
    if model_type == "opt":
        embed_dim = int(config.get("word_embed_proj_dim") or hidden)
        total += (int(config["max_position_embeddings"]) + 2) * hidden + hidden
        total += vocab_size * (embed_dim - hidden)
        total += 2 * embed_dim * hidden if embed_dim != hidden else 0
        per_layer += 4 * hidden + intermediate + hidden + 2 * hidden
    return total + geometry.num_layers * per_layer


def _mlp_elements(config: Mapping[str, Any], geometry: Geometry, dense: int) -> int:
    """Elements of all MLPs, `dense` of one without experts; experts have routers beside them."""
    hidden = geometry.hidden_size
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    if not experts:
        return geometry.num_layers * dense
    size = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    sparse = experts * (3 * hidden * size + hidden) + (3 * hidden * shared + hidden) * bool(shared)
    every = int(config.get("decoder_sparse_step") or 1)
    without = config.get("mlp_only_layers") or ()
    count = sum(
        (index + 1) % every == 0 and index not in without for index in range(geometry.num_layers)
    )
    return count * sparse + (geometry.num_layers - count) * dense
