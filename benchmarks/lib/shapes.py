# SPDX-License-Identifier: Apache-2.0
"""Sizes of models that people serve, described by hand as their `config.json` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _llama_like(
    architecture: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    wide: int,
    vocabulary: int,
) -> dict[str, Any]:
    """`config.json` of a rotary model with gated feed-forward layers and 128-wide heads."""
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": wide,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


_OPT_30B: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "dtype": "float16",
    "hidden_size": 7168,
    "word_embed_proj_dim": 7168,
    "num_hidden_layers": 48,
    "num_attention_heads": 56,
    "ffn_dim": 28672,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
}

SHAPES: dict[str, Mapping[str, Any]] = {
    "Mistral-7B-v0.3": _llama_like("Mistral", 4096, 32, 32, 8, 14336, 32768),
    "Qwen2.5-7B": _llama_like("Qwen2", 3584, 28, 28, 4, 18944, 152064),
    "Llama-3.1-8B": _llama_like("Llama", 4096, 32, 32, 8, 14336, 128256),
    "Qwen3-8B": _llama_like("Qwen3", 4096, 36, 32, 8, 12288, 151936),
    "OPT-30B": _OPT_30B,
    "Qwen2.5-32B": _llama_like("Qwen2", 5120, 64, 40, 8, 27648, 152064),
    "Llama-3.1-70B": _llama_like("Llama", 8192, 80, 64, 8, 28672, 128256),
}
