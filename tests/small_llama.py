# SPDX-License-Identifier: Apache-2.0
"""A small Llama that tests make on the spot: random, or trained for seconds.

4 layers, 4 query heads over 2 KV heads of 64, 2,048 positions, and a byte-level BPE of 2,048 tokens
made of the interpreter's own documentation (`demo.texts`). Trained, it knows which tokens are
common, which is enough for a perplexity far below the vocabulary's and for scores above chance.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from demo import texts

VOCABULARY = 2048
MAX_POSITIONS = 2048
STEPS = 60
_BATCH, _LENGTH = 4, 64
_END = "<|endoftext|>"


def write(folder: Path, dtype: torch.dtype = torch.bfloat16, *, steps: int = 0) -> Path:
    """Save the model with its tokenizer as a Hugging Face folder; returns it."""
    model = build()
    if steps:
        train(model, steps)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Save the tokenizer alone."""
    tokenizer().save_pretrained(folder)


@cache
def tokenizer() -> Any:
    """Puts `<|endoftext|>`, token 0, before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts.documents("calibration"), trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{_END} $A", special_tokens=[(_END, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=_END,
        eos_token=_END,
        pad_token=_END,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build() -> Any:
    """The random model, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model: Any, steps: int) -> float:
    """Train on the calibration text; returns the last loss in nats."""
    ids = tokenizer()(list(texts.documents("calibration")), verbose=False)["input_ids"]
    tokens = torch.tensor([token for document in ids for token in document])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    value = torch.zeros(())
    for _ in range(steps):
        starts = torch.randint(len(tokens) - _LENGTH, (_BATCH, 1), generator=generator)
        batch = tokens[starts + torch.arange(_LENGTH)]
        value = model(input_ids=batch, labels=batch).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return value.item()
