# SPDX-License-Identifier: Apache-2.0
"""A GGUF file is a model like any other: same weights, same tokens, one conversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.tiny import build_model
from vllm_eigen.calibration.model import gguf as ours
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.common.errors import InputError, UsageError

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture
def model() -> Any:
    return build_model("llama", vocab_size=len(_alphabet()) + 3, **SHAPE)


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    """The model as llama.cpp stores it: rotary pairs side by side, a byte-level tokenizer."""
    from gguf import GGUFWriter

    path = tmp_path / "files" / "tiny.gguf"
    path.parent.mkdir()
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*_alphabet(), "ab", "<s>", "</s>"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config.vocab_size - 2)
    writer.add_eos_token_id(config.vocab_size - 1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in model.state_dict().items():
        if (stored := _stored(name)) is not None:
            writer.add_tensor(stored, _as_stored(name, tensor, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(name: str) -> str | None:
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    if name == "lm_head.weight":
        return None
    stem = name.removesuffix(".weight")
    if stem in names:
        return f"{names[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{names[rest]}.weight"


def _as_stored(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp's layout of q and k: the two dimensions of a rotary pair are neighbours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((number for part, number in heads.items() if part in name), None)
    if count is None:
        return tensor
    pairs = tensor.view(count, 2, -1, tensor.shape[-1])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def test_weights_tokens_and_template_are_kept(file: Path, model: Any) -> None:
    source = open_source(str(file))
    assert source.name == "tiny"
    assert "quantization_config" not in source.config
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            torch.testing.assert_close(source.weights.get(name), tensor.bfloat16(), rtol=0, atol=0)
    tokenizer = source.tokenizer()
    alphabet = _alphabet()
    found = tokenizer("abxa", add_special_tokens=False)["input_ids"]
    assert found == [len(alphabet), alphabet.index("x"), alphabet.index("a")]
    assert tokenizer("x")["input_ids"] == [len(alphabet) + 1, alphabet.index("x")]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_a_folder_with_one_file_is_converted_once(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_source(str(file.parent))
    monkeypatch.setattr(ours, "convert", lambda *_: pytest.fail("converted again"))
    second = open_source(str(file))
    assert (first.folder, first.fingerprint) == (second.folder, second.fingerprint)


def test_it_calibrates(file: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line of text, and another one. " * 200, encoding="utf-8")
    output = tmp_path / "eigen"
    size = ("--samples", 4, "--seq-len", 32, "--kv-ratio", 0.6)
    status, _, message = command("calibrate", file, "--output", output, "--text", text, *size)
    assert status == 0, message
    assert (output / "tokenizer.json").is_file()
    assert (output / "chat_template.jinja").is_file()


def test_mistakes_are_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(InputError, match=r"broken\.gguf: transformers cannot read"):
        open_source(str(broken))
    (file.parent / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="2 GGUF files"):
        open_source(str(file.parent))
    monkeypatch.setattr(ours, "find_spec", lambda name: None if name == "gguf" else True)
    with pytest.raises(UsageError, match="needs the package gguf"):
        open_source(str(broken))
