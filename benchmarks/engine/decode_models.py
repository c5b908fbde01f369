# SPDX-License-Identifier: Apache-2.0
"""Random base and Eigen checkpoints of a few layers, at the width of a served model.

Quality is not measured with them. The bases are random too, in the form that calibration writes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eigen.checkpoint.modes import KeyMode

if TYPE_CHECKING:
    from vllm_eigen.calibration.methods.basis import LayerBases

HEAD_SIZE = 128
VOCABULARY = 4096
MARGIN = 512
"""Positions beyond the longest prompt, for answers and the last block."""


@dataclass(frozen=True)
class Settings:
    """What all models of a benchmark share.

    Attributes:
        layers, hidden: depth, and width in multiples of `HEAD_SIZE`.
        dtype: of weights and cache.
        contexts: prompt lengths in tokens; `pairs` of measurements at each.
        batch: sequences decoded together.
        tokens: output tokens of a sequence.
        threads: of each engine.
        pool_mib: KV pool of each engine, MiB.
    """

    layers: int
    hidden: int
    dtype: str
    contexts: tuple[int, ...]
    pairs: tuple[int, ...]
    batch: int
    tokens: int
    threads: int
    pool_mib: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.hidden // HEAD_SIZE

    @property
    def max_model_len(self) -> int:
        """Positions of the models."""
        return max(self.contexts) + MARGIN


@dataclass(frozen=True)
class Model:
    """One compressed model. `rank_k` and `rank_v` are every layer's; the base has `HEAD_SIZE`."""

    family: str
    kv_heads: int
    key_mode: KeyMode
    rank_k: int
    rank_v: int

    @property
    def kv_ratio(self) -> float:
        """KV bytes kept, as a share of the base's."""
        return (self.rank_k + self.rank_v) / (2 * HEAD_SIZE)


MODELS = (
    Model("opt", 16, KeyMode.NO_ROPE, 77, 77),
    Model("llama", 16, KeyMode.PRE_ROPE, 77, 77),
    Model("llama", 16, KeyMode.PRE_ROPE, 52, 102),
    Model("llama", 4, KeyMode.PRE_ROPE, 77, 77),
    Model("llama", 16, KeyMode.POST_ROPE, 96, 96),
)
"""Ratio 0.6, and 0.75 where keys after rotation ask for more; grouped queries in one row."""


def write_models(model: Model, settings: Settings, folder: Path) -> tuple[Path, Path]:
    """Save base and Eigen checkpoints in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

    from vllm_eigen.calibration.export.write import eigen_config, write_checkpoint
    from vllm_eigen.calibration.model.source import open_source
    from vllm_eigen.checkpoint.config import LayerRanks

    hidden = settings.hidden
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "max_position_embeddings": settings.max_model_len,
    }
    config: Any = (
        OPTConfig(**shape, ffn_dim=4 * hidden, word_embed_proj_dim=hidden)
        if model.family == "opt"
        else LlamaConfig(
            **shape, num_key_value_heads=model.kv_heads, intermediate_size=11 * hidden // 4
        )
    )
    base, eigen = folder / "base", folder / "eigen"
    torch.manual_seed(0)
    build: Any = AutoModelForCausalLM.from_config
    build(config, dtype=getattr(torch, settings.dtype)).save_pretrained(base)
    source = open_source(str(base))
    section = eigen_config(
        source,
        [LayerRanks(rank_k=model.rank_k, rank_v=model.rank_v)] * settings.layers,
        key_mode=model.key_mode,
        method="random",
        head_group=1,
        provenance={},
    )
    write_checkpoint(source, section, [_random_bases(model)] * settings.layers, eigen)
    return base, eigen


def _random_bases(model: Model) -> LayerBases:
    import torch

    from vllm_eigen.calibration.methods.basis import LayerBases, orthogonal_basis
    from vllm_eigen.kernels.rope import latent_order

    noise = torch.randn(2, model.kv_heads, HEAD_SIZE, HEAD_SIZE, dtype=torch.float64)
    key, value = (orthogonal_basis(part @ part.mT) for part in noise)
    if model.key_mode.reconstructs_keys:
        key = replace(key, order=latent_order(HEAD_SIZE, HEAD_SIZE, heads=1))
    return LayerBases(key, value)
