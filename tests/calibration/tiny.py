# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family, saved with a word tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = [f"w{n}" for n in range(60)]

_SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

MAKERS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        **_SIZES,
    },
    "mistral": {
        "model_type": "mistral",
        **_SIZES,
        "head_dim": 8,
        "sliding_window": 10,
    },
    "qwen2": {
        "model_type": "qwen2",
        **_SIZES,
    },
    "qwen3": {
        "model_type": "qwen3",
        **_SIZES,
        "head_dim": 8,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_SIZES,
        "num_hidden_layers": 5,
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 10,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 20.0,
    },
    "gemma2": {
        "model_type": "gemma2",
        **_SIZES,
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 10,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 20.0,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "model_type": "phi3",
        **_SIZES,
    },
    "granite": {
        "model_type": "granite",
        **_SIZES,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    "stablelm": {
        "model_type": "stablelm",
        **_SIZES,
        "use_qkv_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "glm4": {
        "model_type": "glm4",
        **_SIZES,
        "head_dim": 8,
        "attention_bias": True,
    },
    "olmo2": {
        "model_type": "olmo2",
        **_SIZES,
    },
    "starcoder2": {
        "model_type": "starcoder2",
        **_SIZES,
        "sliding_window": 10,
        "use_bias": True,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
    "mixtral": {
        "model_type": "mixtral",
        **_SIZES,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **_SIZES,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SIZES,
        "head_dim": 8,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mpt": {
        "model_type": "mpt",
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "max_seq_len": 64,
        "expansion_ratio": 4,
    },
    "opt": {
        "model_type": "opt",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "init_std": 0.2,
    },
}


def build_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model of a kind in `MAKERS`, biases and norms random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": len(WORDS) + 3,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        **MAKERS[kind],
        **changes,
    }
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(seed)
    # Other implementations than eager leave a soft cap out.
    options: dict[str, Any] = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    options["experts_implementation"] = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def save_model(model: Any, folder: Path, *, bos: bool = True, **options: Any) -> Path:
    """Save a model with the word tokenizer as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder, **options)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {word: n + 3 for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special: dict[str, str] = {"unk_token": "<unk>", "eos_token": "</s>"}
    if bos:
        special["bos_token"] = "<s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder."""
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return loaded
