# SPDX-License-Identifier: Apache-2.0
"""A tiny compressed OPT model with random weights, made on the spot: what it says is noise.

One token a byte, so a text has a known number of tokens, and a chat template.
"""

from __future__ import annotations

import json
from pathlib import Path

LAYERS = ((38, 35), (20, 48), (33, 33)) * 4
"""Key and value rank of each layer; the full rank is 64. Deep, so that a load lasts seconds."""
HEADS = 2
HEAD_SIZE = 64
HIDDEN = HEADS * HEAD_SIZE
MAX_POSITIONS = 2048
BYTES_PER_TOKEN = 2 * HEADS * sum(k + v for k, v in LAYERS)
FULL_BYTES_PER_TOKEN = 2 * HEADS * 2 * HEAD_SIZE * len(LAYERS)
SPECIAL = ("<s>", "</s>", "<pad>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write(folder: Path) -> Path:
    """Write the checkpoint and its tokenizer; returns the folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=2 * HIDDEN,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        torch_dtype="bfloat16",
    )
    state = OPTForCausalLM(config).state_dict()
    state.pop("lm_head.weight")
    for index, (rank_k, rank_v) in enumerate(LAYERS):
        path = f"model.decoder.layers.{index}.self_attn"
        for name, rank in (("q_proj", rank_k), ("k_proj", rank_k), ("v_proj", rank_v)):
            state[f"{path}.{name}.weight"] = 0.1 * torch.randn(HEADS * rank, HIDDEN)
            state[f"{path}.{name}.bias"] = torch.zeros(HEADS * rank)
        state[f"{path}.out_proj.weight"] = 0.1 * torch.randn(HIDDEN, HEADS * rank_v)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.bfloat16().contiguous() for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    described = config.to_dict() | {
        "architectures": ["EigenOPTForCausalLM"],
        "dtype": "bfloat16",
        "eigen": {
            "format_version": 1,
            "key_mode": "no-rope",
            "method": "random",
            "num_heads": HEADS,
            "num_kv_heads": HEADS,
            "head_size": HEAD_SIZE,
            "layers": [{"rank_k": k, "rank_v": v} for k, v in LAYERS],
            "provenance": {},
        },
    }
    described.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(described))
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer():  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
