"""Every name the plugin takes from inside vLLM 0.32, and the tricks that lean on its internals.

vLLM's stable surface is its plugin groups and model registry; all else here may move between
releases. When a release moves something, this file is the one to change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config
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
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models import ModelRegistry
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
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_eigen.errors import EngineError
from vllm_eigen.vllm_version import SUPPORTED

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Attention",
    "AttentionBackend",
    "AttentionImpl",
    "AttentionMetadataBuilder",
    "AttentionType",
    "AutoWeightsLoader",
    "ColumnParallelLinear",
    "CommonAttentionMetadata",
    "IntermediateTensors",
    "KVCacheLayout",
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
    "cached_attention",
    "forget_layer",
    "get_current_vllm_config",
    "get_pp_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "init_logger",
    "make_empty_intermediate_tensors_factory",
    "make_layers",
    "maybe_prefix",
    "rotary_cos_sin",
    "score_options",
    "set_weight_attrs",
    "stock_model",
    "support_torch_compile",
]


def stock_model(architecture: str) -> type[nn.Module]:
    """vLLM's own class for a Hugging Face architecture."""
    found = ModelRegistry._try_load_model_cls(architecture)
    if found is None:
        raise EngineError(f"this vLLM has no model {architecture}; supported: vLLM {SUPPORTED}")
    return found


def forget_layer(vllm_config: VllmConfig, attention: Attention) -> None:
    """Undo the registration of a stock attention layer that is about to be replaced.

    Constructing an `Attention` enters it into the table from which vLLM later makes the KV-cache
    specification; a layer left behind there would get pages of its own.
    """
    del vllm_config.compilation_config.static_forward_context[attention.layer_name]


def cached_attention(
    layer: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Write key and value to the layer's pages, attend, and fill `output`.

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


def rotary_cos_sin(rotary: Any) -> dict[str, Any]:
    """The parameters of a vLLM rotary embedding that our kernels need.

    Returns:
        `cos_sin` [max_position, rotary_dim] float32, `rotary_dim`, `is_neox_style`.
    """
    # Not the module's buffer, which may be rounded to bfloat16. Layers share one rotary module,
    # and one table.
    if not hasattr(rotary, "eigen_cos_sin"):
        rotary.eigen_cos_sin = rotary._compute_cos_sin_cache().float().contiguous()
    return {
        "cos_sin": rotary.eigen_cos_sin,
        "rotary_dim": int(rotary.rotary_dim),
        "is_neox_style": bool(rotary.is_neox_style),
    }


def stop_engine(llm: Any) -> None:
    """End the engine behind a `vllm.LLM` and its processes; vLLM waits for the collector."""
    llm.llm_engine.engine_core.shutdown()
