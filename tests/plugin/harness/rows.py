# SPDX-License-Identifier: Apache-2.0
"""The rows of the compatibility matrix: every family in every key mode, as tiny random models."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.calibration.coded import RANKS, write_coded
from tests.calibration.tiny import WORDS, build_model, save_model
from vllm_eigen import cli
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.checkpoint.validate import serving_overrides

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
PLAIN_RANKS = [[13, 24], [21, 18]]
"""Of keys and values, layer by layer, for heads of 32."""
EXACT = {"kernels": "reference"}
"""Of the engine: kernels of float32 arithmetic. Integer products round queries, and a latent of the
next layer that lies next to the border of two codes then gets the other one."""
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

    def write_base(self, folder: Path) -> Path:
        """Make the base model below `folder`."""
        sizes = {"opt": OPT, "mpt": MPT}.get(self.kind, SIZES)
        base = save_model(build_model(self.kind, **{**sizes, **self.changes}), folder / "base")
        if self.kind == "qwen2":
            save_characters(base)
        return base

    def write(self, folder: Path) -> Served:
        """Make the base model and its Eigen checkpoint below `folder`."""
        base = self.write_base(folder)
        if not self.bases_only:
            eigen = compress(base, folder / "eigen", *self.options)
            return Served(base, eigen, eigen, dict(self.engine))
        # Bases alone cannot carry refitted weights; the reference must not have them either.
        eigen = compress(base, folder / "eigen", *self.options, "--no-refit")
        bases = compress(base, folder / "bases", *self.options, "--bases-only")
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        overrides = serving_overrides(bases, config)
        return Served(base, eigen, base, {"hf_overrides": overrides, **self.engine})

    @property
    def engine(self) -> dict[str, Any]:
        """What the engine is told besides."""
        # vLLM's own CPU attention, in the layers that are kept, takes blocks of 32.
        return {"block_size": 32} if self.kind in ("gemma2", "gemma3_text") else {}


@dataclass(frozen=True, eq=False)
class CodedRow(Row):
    """A row with coded latents and offsets, of made-up widths (`tests.calibration.coded`).

    Attributes:
        key_mode, head_group: of the checkpoint.
        exact: whether the engine takes the reference kernels, else those of the machine.
        compressed: layers that are compressed, if there are so many.
    """

    key_mode: KeyMode | None = None
    head_group: int = 1
    exact: bool = True
    compressed: int = len(RANKS)

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}-coded"

    def write(self, folder: Path) -> Served:
        """Make the base model and its coded checkpoint below `folder`."""
        base = self.write_base(folder)
        write = partial(write_coded, base, key_mode=self.key_mode, head_group=self.head_group)
        ranks = RANKS[-self.layers :]
        kernels = dict(EXACT) if self.exact else {}
        write(folder / "eigen", ranks, untouched=self.bases_only)
        if not self.bases_only:
            return Served(base, folder / "eigen", folder / "eigen", {**kernels, **self.engine})
        write(folder / "bases", ranks, bases_only=True)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        overrides = serving_overrides(folder / "bases", config)
        options = {"hf_overrides": overrides, **kernels, **self.engine}
        return Served(base, folder / "eigen", base, options)

    @property
    def layers(self) -> int:
        """Layers that are compressed."""
        return min(int(self.changes.get("num_hidden_layers", len(RANKS))), self.compressed)


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
    ranks.write_text(json.dumps(PLAIN_RANKS), encoding="utf-8")
    arguments = ["calibrate", str(base), "--output", str(output), "--text", str(text), "--quiet"]
    arguments += ["--ranks", str(ranks), "--samples", "8", "--seq-len", "64"]
    arguments += ["--method", "sensitivity", *options]
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
NO_REFIT = ("--no-refit",)
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
SOFT_CAP = {"attn_logit_softcapping": 20.0}
"""vLLM's own CPU attention gives NaN where a score is far beyond the cap."""
LONGROPE = {
    "max_position_embeddings": 4 * MAX_MODEL_LEN,
    "original_max_position_embeddings": MAX_MODEL_LEN,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * pair for pair in range(16)],
        "long_factor": [2.0 + pair for pair in range(16)],
        "original_max_position_embeddings": MAX_MODEL_LEN,
    },
}
"""Served up to the original length, so with the short factors."""

ROWS = (
    Row("opt", "no-rope"),
    Row("opt", "folded-post-norm", {"do_layer_norm_before": False}),
    Row("opt", "bases-only", bases_only=True),
    Row("opt", "head-groups", options=GROUPS),
    Row("mpt", "no-rope"),
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
    Row("gemma3_text", "pre-rope", WINDOW, NO_REFIT),
    Row("gemma3_text", "post-rope", WINDOW, (*POST, *NO_REFIT)),
    Row("gemma3_text", "bases-only", WINDOW, bases_only=True),
)

CODED_ROWS = (
    CodedRow("opt", "no-rope"),
    CodedRow("opt", "bases-only", bases_only=True),
    CodedRow("opt", "head-groups", head_group=2),
    CodedRow("mpt", "no-rope"),
    CodedRow("mpt", "clipped", {"attn_config": {"clip_qkv": 2.0}}),
    CodedRow("llama", "pre-rope"),
    CodedRow("llama", "post-rope", key_mode=KeyMode.POST_ROPE),
    CodedRow("llama", "head-groups", head_group=2),
    CodedRow("llama", "bases-only", bases_only=True),
    CodedRow("mistral", "pre-rope", WINDOW),
    CodedRow("mistral", "post-rope", WINDOW, key_mode=KeyMode.POST_ROPE),
    CodedRow("qwen2", "pre-rope"),
    CodedRow("qwen2", "post-rope-groups", key_mode=KeyMode.POST_ROPE, head_group=2),
    CodedRow("qwen3", "pre-rope"),
    CodedRow("qwen3", "post-rope", key_mode=KeyMode.POST_ROPE),
    CodedRow("gemma3_text", "pre-rope", WINDOW),
    CodedRow("gemma3_text", "post-rope", WINDOW, key_mode=KeyMode.POST_ROPE),
    CodedRow("gemma3_text", "bases-only", WINDOW, bases_only=True),
)

ONE_LAYER = {"num_hidden_layers": 1}
MACHINE_ROWS = (
    CodedRow("opt", "one-layer", ONE_LAYER, exact=False),
    CodedRow("qwen3", "one-layer-post-rope", ONE_LAYER, key_mode=KeyMode.POST_ROPE, exact=False),
)
"""For the machine's own kernels: what they round cannot move a code of a layer that follows. To the
kernels Phi-3's rows below are Llama's, and StarCoder2's is Mistral's."""

FAMILY_ROWS = (
    CodedRow("phi3", "pre-rope", ONE_LAYER, exact=False),
    CodedRow("phi3", "post-rope", ONE_LAYER, key_mode=KeyMode.POST_ROPE, exact=False),
    CodedRow("phi3", "longrope", {**ONE_LAYER, **LONGROPE}, exact=False),
    CodedRow("granite", "pre-rope", ONE_LAYER, exact=False),
    CodedRow("stablelm", "pre-rope", ONE_LAYER, exact=False),
    CodedRow("glm4", "pre-rope", ONE_LAYER, exact=False),
    CodedRow("glm4", "post-rope", ONE_LAYER, key_mode=KeyMode.POST_ROPE, exact=False),
    CodedRow("gemma2", "pre-rope", {**WINDOW, **SOFT_CAP}, exact=False, compressed=1),
    CodedRow("olmo2", "pre-rope", ONE_LAYER, exact=False),
    CodedRow("starcoder2", "pre-rope", {**ONE_LAYER, **WINDOW}, exact=False),
    CodedRow("mixtral", "pre-rope", ONE_LAYER, exact=False),
    CodedRow("qwen2_moe", "pre-rope", ONE_LAYER, exact=False),
    CodedRow("qwen3_moe", "pre-rope", ONE_LAYER, exact=False),
)
"""Of families that lean on what those above prove: one engine each, coded."""

MACHINE_LIMITS = {"limit": 1e-3}

CODED_LIMITS = {"limit": 1e-3, "flipped": 0.15}
"""Nearly all prompts stay at 1e-6. Where a latent lies next to the border of two codes and gets the
other one, its prompt may be beyond 1e-3."""


def limits(row: Row) -> dict[str, float]:
    """The errors that `harness.engine.check` allows."""
    return CODED_LIMITS if isinstance(row, CodedRow) else {}
