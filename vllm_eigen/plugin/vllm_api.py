# SPDX-License-Identifier: Apache-2.0
"""Every name the plugin takes from inside vLLM, and the calls that lean on its internals.

vLLM's stable surface is its plugin groups and model registry; all else here may move between
releases. When a release moves something, this file is the one to change; where releases differ,
each has a module (`vllm_version`).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import ModelRegistry, envs
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import (
    Phi3LongRoPEScaledRotaryEmbedding,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from vllm_eigen.checkpoint.pages import MixedCache
from vllm_eigen.common.errors import EngineError
from vllm_eigen.kernels.rope import RotaryTable, even_frequencies

__all__ = [
    "Attention",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionMetadataBuilder",
    "AttentionType",
    "AutoWeightsLoader",
    "ColumnParallelLinear",
    "CommonAttentionMetadata",
    "IntermediateTensors",
    "KVCacheLayout",
    "KVCacheSpec",
    "LayerNorm",
    "LogitsProcessor",
    "MultipleOf",
    "PPMissingLayer",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RowParallelLinear",
    "SupportsPP",
    "VllmConfig",
    "VocabParallelEmbedding",
    "WeightsMapper",
    "attention_layers",
    "backend_refusals",
    "cached_attention",
    "device_capability",
    "forget_layer",
    "get_current_vllm_config",
    "get_pp_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "init_logger",
    "make_empty_intermediate_tensors_factory",
    "make_layers",
    "maybe_prefix",
    "mixed_cache",
    "projected",
    "rotary_of",
    "rotary_table",
    "rotate_query",
    "runs_transformers",
    "score_options",
    "set_weight_attrs",
    "stock_class",
    "support_torch_compile",
]


def stock_class(architecture: str) -> type[torch.nn.Module]:
    """The class with which vLLM serves an architecture.

    Raises:
        EngineError: this vLLM has none.
    """
    registered = ModelRegistry.models.get(architecture)
    if registered is None:
        raise EngineError(f"this vLLM does not serve {architecture}; install another release of it")
    found: type[torch.nn.Module] = registered.load_model_cls()
    return found


def forget_layer(vllm_config: VllmConfig, attention: Attention) -> None:
    """Undo the registration of a stock attention layer that is about to be replaced.

    Constructing an `Attention` enters it into the table from which vLLM later makes the KV-cache
    specification; a layer left behind there would get blocks of its own. vLLM has no call that
    removes one.
    """
    del vllm_config.compilation_config.static_forward_context[attention.layer_name]


def attention_layers(vllm_config: VllmConfig, names: list[str]) -> list[Any]:
    """The constructed attention layers of these names."""
    return list(get_layers_from_vllm_config(vllm_config, Attention, names).values())


def device_capability() -> tuple[int, int] | None:
    """Compute capability of the NVIDIA GPU that vLLM runs on; None on another device."""
    if not current_platform.is_cuda():
        return None
    found = current_platform.get_device_capability()
    return None if found is None else (found.major, found.minor)


def backend_refusals(
    backend: type[AttentionBackend], vllm_config: VllmConfig, head_size: int
) -> list[str]:
    """What vLLM's own check of a backend says against it, which it leaves out for named ones."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    found: list[str] = backend.validate_configuration(
        head_size=head_size,
        dtype=vllm_config.model_config.dtype,
        kv_cache_dtype=cache.cache_dtype,
        block_size=cache.block_size if cache.user_specified_block_size else None,
        use_mla=False,
        has_sink=False,
        use_sparse=False,
        use_mm_prefix=False,
        use_per_head_quant_scales=False,
        device_capability=current_platform.get_device_capability(),
        attn_type=AttentionType.DECODER,
        use_batch_invariant=envs.VLLM_BATCH_INVARIANT,
        use_kv_connector=vllm_config.kv_transfer_config is not None,
        use_pcp=parallel.prefill_context_parallel_size > 1,
        use_dcp=parallel.decode_context_parallel_size > 1,
    )
    return found


def cached_attention(
    layer: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Write key and value to the layer's blocks, attend, and fill `output`.

    Goes through vLLM's opaque custom ops, so `torch.compile` sees one node and no graph break.
    The shapes are those of the layer's `AttentionImpl`.
    """
    name = _encode_layer_name(layer.layer_name)
    written = torch.ops.vllm.unified_kv_cache_update(key, value, name)
    torch.ops.vllm.unified_attention_with_output(
        query, key, value, output, name, kv_cache_dummy_dep=written
    )


def score_options(attention: Attention) -> dict[str, Any]:
    """How a stock layer scores keys, as arguments for another `Attention`."""
    impl = attention.impl
    slopes = getattr(impl, "alibi_slopes", None)
    if isinstance(slopes, torch.Tensor):
        slopes = slopes.tolist()
    return {
        "scale": impl.scale,
        "alibi_slopes": slopes,
        "logits_soft_cap": getattr(impl, "logits_soft_cap", None) or None,
        "per_layer_sliding_window": attention.sliding_window,
    }


def mixed_cache(
    vllm_config: VllmConfig, *, compressed_layers: int, kept_layers: int, kept_bytes: int
) -> MixedCache | None:
    """What the pages of a mixed model depend on; None where vLLM keeps no sliding windows and all
    layers have the same blocks."""
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return None
    return MixedCache(
        compressed_layers=compressed_layers,
        kept_layers=kept_layers,
        kept_bytes=kept_bytes,
        window=int(vllm_config.model_config.hf_text_config.sliding_window),
        in_flight=vllm_config.max_in_flight_tokens,
        max_model_len=vllm_config.model_config.max_model_len,
    )


def rotary_table(rotary: Any) -> RotaryTable:
    """Table and frequencies of a vLLM rotary embedding."""
    # Not the module's buffer, which may be rounded to bfloat16.
    if not isinstance(rotary, Phi3LongRoPEScaledRotaryEmbedding):
        cos_sin = rotary._compute_cos_sin_cache().float().contiguous()
        return RotaryTable(cos_sin, even_frequencies(cos_sin), bool(rotary.is_neox_style))
    # One of two, by the longest sequence that is served.
    long = rotary.max_position_embeddings, rotary.long_factor, rotary.long_mscale
    short = rotary.original_max_position_embeddings, rotary.short_factor, rotary.short_mscale
    cos_sin = rotary._compute_cos_sin_cache(*(long if rotary.use_long_rope else short))
    return RotaryTable(cos_sin.float().contiguous(), even_frequencies(cos_sin))


def projected(linear: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What one of vLLM's linear layers makes of rows; some return a bias beside it."""
    output = linear(rows)
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def runs_transformers(model: torch.nn.Module) -> bool:
    """Whether vLLM runs transformers' own model, for lack of one that it has itself."""
    from vllm.model_executor.models.transformers.base import Base

    return isinstance(model, Base)


def rotary_of(stock: Any, vllm_config: VllmConfig, is_neox_style: bool) -> Any:
    """The rotary embedding of a stock attention module; transformers' modules have none."""
    found = getattr(stock, "rotary_emb", None)
    if found is not None:
        return found
    config = vllm_config.model_config.hf_text_config
    return get_rope(
        stock.head_dim,
        max_position=config.max_position_embeddings,
        is_neox_style=is_neox_style,
        rope_parameters=config.rope_parameters,
    )


def rotate_query(rotary: Any, positions: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """Rotate queries [num_tokens, num_heads * head_size] alone."""
    # LongRoPE insists on a key.
    needs_key = isinstance(rotary, Phi3LongRoPEScaledRotaryEmbedding)
    rotated, _ = rotary(positions, query, query[:, : rotary.head_size] if needs_key else None)
    return rotated
