# SPDX-License-Identifier: Apache-2.0
"""Models with random weights, and words for them: enough to calibrate, at any size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS = 1000


def save_model(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a model with the sizes of a `config.json`, and a tokenizer of `WORDS` words.

    Weights have the type that `config` names, float32 by default.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    described = AutoConfig.for_model(**config, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    dtype = getattr(torch, str(config.get("dtype", "float32")))
    AutoModelForCausalLM.from_config(described, dtype=dtype).save_pretrained(folder)
    vocabulary = {"</s>": 0, "<unk>": 1} | {f"w{n}": n + 2 for n in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def words(count: int) -> str:
    """Text of so many words in no order."""
    return " ".join(f"w{(n * n + n // 7) % WORDS}" for n in range(count))


def layer_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of one decoder layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def count(layers: int) -> int:
        described = AutoConfig.for_model(**{**config, "num_hidden_layers": layers})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
        return sum(int(item.numel()) for item in model.parameters())

    return count(2) - count(1)
