# SPDX-License-Identifier: Apache-2.0
"""MPT for vLLM: the decoder that vLLM 0.32 no longer ships, so that base and Eigen can be served.

Positions enter as ALiBi, a slope per head times the distance (Press et al., 2022,
arXiv 2108.12409); query, key and value are one fused projection that may be clipped. Built from
vLLM's own layers; weights load from the Hugging Face checkpoint as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vllm_eigen.checkpoint.families import family_of
from vllm_eigen.plugin.vllm_api import (
    Attention,
    AutoWeightsLoader,
    ColumnParallelLinear,
    IntermediateTensors,
    LayerNorm,
    LogitsProcessor,
    ParallelLMHead,
    PPMissingLayer,
    QKVParallelLinear,
    RowParallelLinear,
    SupportsPP,
    VllmConfig,
    VocabParallelEmbedding,
    WeightsMapper,
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
    support_torch_compile,
)


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> list[float]:
    """Slope of each head, as MPT orders them when the head count is no power of two."""
    rounded = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** -(bias_max * (head + 1) / rounded) for head in range(rounded)]
    if rounded == num_heads:
        return slopes
    return (slopes[1::2] + slopes[::2])[:num_heads]


class MPTAttention(nn.Module):
    """Multi-head attention with ALiBi."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        num_heads = int(config.n_heads)
        head_size = config.d_model // num_heads
        self.clip_qkv: float | None = config.attn_config.clip_qkv
        self.qkv_proj = QKVParallelLinear(
            config.d_model,
            head_size,
            num_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.Wqkv",
        )
        self.out_proj = RowParallelLinear(
            config.d_model,
            config.d_model,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.out_proj",
        )
        local = num_heads // get_tensor_model_parallel_world_size()
        first = get_tensor_model_parallel_rank() * local
        slopes = alibi_slopes(num_heads, config.attn_config.alibi_bias_max)
        self.attn = Attention(
            local,
            head_size,
            config.attn_config.softmax_scale or head_size**-0.5,
            alibi_slopes=slopes[first : first + local],
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] to the same."""
        qkv, _ = self.qkv_proj(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = qkv.chunk(3, dim=-1)
        output, _ = self.out_proj(self.attn(query, key, value))
        return output


class MPTFeedForward(nn.Module):
    """Two linear maps with an exact GELU between."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        inner = config.expansion_ratio * config.d_model
        options = {"bias": False, "quant_config": vllm_config.quant_config}
        self.up_proj = ColumnParallelLinear(
            config.d_model, inner, prefix=f"{prefix}.up_proj", **options
        )
        self.act = nn.GELU(approximate="none")
        self.down_proj = RowParallelLinear(
            inner, config.d_model, prefix=f"{prefix}.down_proj", **options
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] to the same."""
        inner, _ = self.up_proj(hidden_states)
        output, _ = self.down_proj(self.act(inner))
        return output


class MPTBlock(nn.Module):
    """One decoder layer, layer norm before attention and before the feed-forward part."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.norm_1 = _norm(config)
        self.attn = MPTAttention(config, vllm_config, f"{prefix}.attn")
        self.norm_2 = _norm(config)
        self.ffn = MPTFeedForward(config, vllm_config, f"{prefix}.ffn")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] to the same."""
        hidden_states = hidden_states + self.attn(hidden_states=self.norm_1(hidden_states))
        return hidden_states + self.ffn(self.norm_2(hidden_states))


# Named because annotations here are strings, from which vLLM cannot tell the tensors.
@support_torch_compile(
    dynamic_arg_dims=dict.fromkeys(
        ("input_ids", "positions", "intermediate_tensors", "inputs_embeds"), 0
    )
)
class MPTModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.wte = VocabParallelEmbedding(config.vocab_size, config.d_model)
        self.start_layer, self.end_layer, self.blocks = make_layers(
            config.n_layers,
            lambda prefix: MPTBlock(config, vllm_config, prefix),
            prefix=f"{prefix}.blocks",
        )
        self.norm_f = _norm(config) if get_pp_group().is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.d_model
        )

    def embed_input_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """[num_tokens] to [num_tokens, hidden]."""
        return self.wte(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """One step over this pipeline stage's layers; ALiBi needs no positions here."""
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None  # vLLM's contract between stages
            hidden_states = intermediate_tensors["hidden_states"]
        elif inputs_embeds is not None:
            hidden_states = inputs_embeds
        else:
            hidden_states = self.embed_input_ids(input_ids)
        for block in self.blocks[self.start_layer : self.end_layer]:
            hidden_states = block(hidden_states)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm_f(hidden_states)


class MPTForCausalLM(nn.Module, SupportsPP):
    """MPT with its language-model head, tied to the embeddings or not."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".Wqkv.": ".qkv_proj."},
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        config = self.config.to_dict()
        family_of(config).check_required(config)
        self.transformer = MPTModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer")
        )
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.d_model, prefix=maybe_prefix(prefix, "lm_head")
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.make_empty_intermediate_tensors = self.transformer.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] to [num_tokens, hidden]."""
        return self.transformer.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states of one step."""
        return self.transformer(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[num_tokens, hidden] to [num_tokens, vocabulary]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a Hugging Face checkpoint; its fused projection has vLLM's order already."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _norm(config: Any) -> LayerNorm:
    return LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=False)
