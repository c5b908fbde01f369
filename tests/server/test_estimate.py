"""The estimate against known models, and its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import served_model

from server.estimate import estimate
from server.weights import read_model
from vllm_eigen import cli
from vllm_eigen.errors import UnsupportedModelError, UsageError

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


@pytest.mark.parametrize(("config", "billions"), [(LLAMA_8B, 8.030), (OPT_6_7B, 6.658)])
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


def test_compressed_checkpoint_brings_its_ranks(checkpoint: Path) -> None:
    config, stored = read_model(str(checkpoint))
    found = estimate(config, 64 << 20, block_size=128, stored_bytes=stored)
    assert found.compressed.bytes_per_token == served_model.BYTES_PER_TOKEN
    assert found.uncompressed.bytes_per_token == served_model.FULL_BYTES_PER_TOKEN
    assert found.compressed.weight_bytes == stored
    counted = estimate(config, 64 << 20, block_size=128).compressed.weight_bytes
    assert counted == pytest.approx(stored, rel=0.02)
    with pytest.raises(UsageError, match="compressed already"):
        estimate(config, 64 << 20, kv_ratio=0.5)


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        ({}, {"kv_ratio": 0.0}, UsageError),
        ({}, {"kv_ratio": 1.5}, UsageError),
        ({}, {"kv_cache_dtype": "int3"}, UsageError),
        ({}, {"memory": 1 << 30}, UsageError),
        ({"architectures": ["Unknown"]}, {}, UnsupportedModelError),
        ({"vocab_size": None}, {}, UnsupportedModelError),
    ],
)
def test_refusals(change: dict, options: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        estimate({**LLAMA_8B, **change}, **{"memory": 80 << 30, **options})


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    command = ["estimate", str(tmp_path), "--memory", "80GiB", "--kv-ratio", "0.6"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compressed"]["tokens"] > found["uncompressed"]["tokens"]
    assert cli.main(command) == 0
    assert "KV bytes a token" in capsys.readouterr().out
    assert cli.main(["estimate", str(tmp_path / "none"), "--memory", "1GiB"]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["estimate", str(tmp_path), "--memory", "much"]) == 2
