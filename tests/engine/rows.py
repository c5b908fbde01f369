"""The rows of the compatibility matrix: every family in every key mode, as tiny random models."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.calibration.tiny import WORDS, build_model, save_model
from vllm_eigen import cli
from vllm_eigen.checkpoint import serving_overrides

MAX_MODEL_LEN = 512
# vLLM's own CPU attention knows no smaller head.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_MODEL_LEN,
}
OPT: dict[str, Any] = {
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "max_position_embeddings": MAX_MODEL_LEN,
}
MPT: dict[str, Any] = {"d_model": 128, "max_seq_len": MAX_MODEL_LEN}
RANKS = [[13, 24], [21, 18]]
"""Of keys and values, layer by layer, for heads of 32."""
SCALED = MAX_MODEL_LEN // 4
"""Positions the scaled models were made for, so that prompts go past them."""


@dataclass(frozen=True, eq=False)
class Row:
    """One family in one key mode.

    Attributes:
        kind: a family of `tests.calibration.tiny`.
        name: what tells it from the family's other rows.
        changes: of the tiny model's configuration.
        options: of `vllm-eigen calibrate`.
        bases_only: whether the base model is served, with the bases beside it.
    """

    kind: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    bases_only: bool = False

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"

    def write(self, folder: Path) -> Served:
        """Make the base model and its Eigen checkpoint below `folder`."""
        sizes = {"opt": OPT, "mpt": MPT}.get(self.kind, SIZES)
        base = save_model(build_model(self.kind, **{**sizes, **self.changes}), folder / "base")
        if self.kind == "qwen2":
            save_characters(base)
        if not self.bases_only:
            eigen = compress(base, folder / "eigen", *self.options)
            return Served(base, eigen, eigen, {})
        # Bases alone cannot carry refitted weights; the reference must not have them either.
        eigen = compress(base, folder / "eigen", *self.options, "--no-refit")
        bases = compress(base, folder / "bases", *self.options, "--bases-only")
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        return Served(base, eigen, base, {"hf_overrides": serving_overrides(bases, config)})


@dataclass(frozen=True)
class Served:
    """A row on disk.

    Attributes:
        base: the uncompressed model.
        eigen: a checkpoint whose transformers reference is what the engine must give.
        model: the folder the engine loads.
        options: what else the engine is told.
    """

    base: Path
    eigen: Path
    model: Path
    options: dict[str, Any]


def compress(base: Path, output: Path, *options: str) -> Path:
    """Calibrate on random words with the real command, to ranks that differ wherever they can."""
    text, ranks = output.with_suffix(".txt"), output.with_suffix(".json")
    generator = random.Random(0)
    documents = [" ".join(generator.choices(WORDS, k=60)) for _ in range(12)]
    text.write_text("<|endoftext|>".join(documents), encoding="utf-8")
    ranks.write_text(json.dumps(RANKS), encoding="utf-8")
    arguments = ["calibrate", str(base), "--output", str(output), "--text", str(text), "--quiet"]
    arguments += ["--ranks", str(ranks), "--samples", "8", "--seq-len", "64", *options]
    assert cli.main(arguments) == 0
    return output


def save_characters(folder: Path) -> None:
    """A tokenizer of characters; transformers reads Qwen2 with byte-level pairs, come what may."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "Ġ", *"0123456789abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def _scaled(rope_type: str, **parameters: Any) -> dict[str, Any]:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, **parameters}
    return {"rope_parameters": rope}


POST = ("--key-cache", "post-rope")
GROUPS = ("--head-group", "2")
YARN = _scaled("yarn", original_max_position_embeddings=SCALED)
LLAMA3 = _scaled(
    "llama3",
    original_max_position_embeddings=SCALED,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
WINDOW = {"sliding_window": 150}
ONE_KV_HEAD = {"num_key_value_heads": 1}

ROWS = (
    Row("opt", "folded"),
    Row("opt", "folded-post-norm", {"do_layer_norm_before": False}),
    Row("opt", "bases-only", bases_only=True),
    Row("opt", "head-groups", options=GROUPS),
    Row("mpt", "folded"),
    Row("mpt", "clipped", {"attn_config": {"clip_qkv": 2.0}}),
    Row("mpt", "bases-only", bases_only=True),
    Row("llama", "pre-rope"),
    Row("llama", "post-rope", options=POST),
    Row("llama", "head-groups", options=GROUPS),
    Row("llama", "bases-only", bases_only=True),
    Row("llama", "one-kv-head", ONE_KV_HEAD),
    Row("llama", "llama3-scaling", LLAMA3),
    Row("llama", "linear-scaling", _scaled("linear")),
    Row("llama", "dynamic-scaling", _scaled("dynamic")),
    Row("llama", "yarn-scaling", YARN),
    Row("mistral", "pre-rope", WINDOW),
    Row("mistral", "post-rope", WINDOW, POST),
    Row("qwen2", "pre-rope"),
    Row("qwen2", "post-rope-groups", options=(*POST, *GROUPS)),
    Row("qwen3", "pre-rope"),
    Row("qwen3", "post-rope", options=POST),
)
