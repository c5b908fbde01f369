# SPDX-License-Identifier: Apache-2.0
"""The estimate against known models."""

from __future__ import annotations

import pytest

from vllm_eigen.checkpoint.estimate import estimate
from vllm_eigen.common.errors import UnsupportedModelError, UsageError

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
    "intermediate_size": 14336, "vocab_size": 128256, "torch_dtype": "bfloat16",
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
OPT_6_7B = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 32, "ffn_dim": 16384, "vocab_size": 50272,
    "torch_dtype": "float16", "max_position_embeddings": 2048, "word_embed_proj_dim": 4096,
}  # fmt: skip

GEMMA_270M = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 640,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 18,
    "intermediate_size": 2048, "vocab_size": 262144, "torch_dtype": "bfloat16",
    "max_position_embeddings": 32768, "sliding_window": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions"), [(LLAMA_8B, 8.030), (OPT_6_7B, 6.658), (GEMMA_270M, 0.2681)]
)
def test_weights_from_the_config(config: dict, billions: float) -> None:
    found = estimate(config, 80 << 30).uncompressed.weight_bytes
    assert found / 2e9 == pytest.approx(billions, rel=1e-3)


def test_ratio_and_fp8() -> None:
    plain = estimate(LLAMA_8B, 80 << 30)
    small = estimate(LLAMA_8B, 80 << 30, kv_ratio=0.6)
    fp8 = estimate(LLAMA_8B, 80 << 30, kv_ratio=0.6, kv_cache_dtype="fp8_e4m3")
    assert plain.uncompressed.bytes_per_token == 2 * 2 * 8 * 128 * 32
    assert plain.compressed == plain.uncompressed
    assert small.compressed.bytes_per_token / 131072 == pytest.approx(0.6, abs=1e-3)
    assert fp8.compressed.bytes_per_token * 2 == small.compressed.bytes_per_token
    assert small.compressed.tokens % 16 == 0
    assert small.compressed.tokens > small.uncompressed.tokens / 0.6


def test_layers_with_windows_are_kept() -> None:
    """Of 18 layers every sixth has full attention: groups of 3, one of them and five kept."""
    memory = 4 << 30
    found = estimate(GEMMA_270M, memory, kv_bits=4, block_size=128)
    windows = 5 * (-(-(511 + 4096) // 128) + 1)
    base = 32768 // 128 + windows
    # 254 of 1,024 bytes, in multiples of 16 directions: 512 tokens in the page of 128.
    coded = -(-32768 // 512) + windows
    assert found.kept_layers == 15
    assert found.kv_ratio == 254 / 1024
    assert found.pool_ratio == coded / base
    blocks = found.uncompressed.pool_bytes // (3 * 128 * 1024)
    assert found.uncompressed.tokens == int(blocks / base * 32768)
    assert found.compressed.sequences == found.compressed.pool_bytes // (3 * 128 * 1024) / coded
    unchanged = estimate(GEMMA_270M, memory, block_size=128)
    assert unchanged.compressed == unchanged.uncompressed == found.uncompressed


def test_codes_have_bytes_of_their_own() -> None:
    code = {"eight": 8, "four": 56, "two": 16}
    layer = {
        "rank_k": 80,
        "rank_v": 128,
        "key_code": code,
        "value_code": {"four": 128, "token_scale": True},
    }
    eigen = {
        "format_version": 3,
        "key_mode": "pre-rope",
        "method": "made up",
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_size": 128,
        "layers": [layer] * 32,
        "key_offset": True,
        "provenance": {},
    }
    config = {**LLAMA_8B, "architectures": ["EigenLlamaForCausalLM"], "eigen": eigen}
    found = estimate(config, 80 << 30)
    assert found.compressed.bytes_per_token == 32 * 8 * (8 + 28 + 4 + 64 + 2)
    assert found.kv_ratio == found.compressed.bytes_per_token / found.uncompressed.bytes_per_token
    with pytest.raises(UsageError, match="coded latents"):
        estimate(config, 80 << 30, kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    ("bits", "head_bytes"),
    [
        (9, 128 + 130),
        (8, 128 + 120 + 2),
        (4, 64 + 60 + 2),
        (3, 48 + 44 + 2),
    ],
)
def test_bits_of_a_base_model(bits: float, head_bytes: int) -> None:
    found = estimate(LLAMA_8B, 80 << 30, kv_bits=bits)
    assert found.compressed.bytes_per_token == 32 * 8 * head_bytes
    assert found.kv_ratio == head_bytes / 512
    assert found.kv_ratio <= bits / 16
    # The bases that reconstruct keys: full rank, so nothing else changes.
    bases = 2 * 32 * 8 * 128 * 128
    assert found.compressed.weight_bytes - found.uncompressed.weight_bytes == bases


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        ({}, {"kv_ratio": 0.0}, UsageError),
        ({}, {"kv_ratio": 1.5}, UsageError),
        ({}, {"kv_cache_dtype": "int3"}, UsageError),
        ({}, {"kv_bits": 2}, UsageError),
        ({}, {"kv_bits": 17}, UsageError),
        ({"head_dim": 72}, {"kv_bits": 4}, UsageError),
        ({}, {"kv_bits": 4, "kv_ratio": 0.5}, UsageError),
        ({}, {"kv_bits": 4, "kv_cache_dtype": "fp8"}, UsageError),
        ({}, {"memory": 1 << 30}, UsageError),
        ({"architectures": ["Unknown"]}, {}, UnsupportedModelError),
        ({"vocab_size": None}, {}, UnsupportedModelError),
    ],
)
def test_refusals(change: dict, options: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        estimate({**LLAMA_8B, **change}, **{"memory": 80 << 30, **options})
