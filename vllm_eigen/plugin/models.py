# SPDX-License-Identifier: Apache-2.0
"""vLLM models of the Eigen architectures: the stock model with its attention modules replaced.

A class is made when vLLM asks for it (`model_entry`), of the class that vLLM has for the base; the
family's description says where the attention modules are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from vllm_eigen.checkpoint.config import EigenConfig, check_cache_dtype, parse_config
from vllm_eigen.checkpoint.families import FAMILIES, family_of
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import EngineError, UsageError
from vllm_eigen.kernels import Latents, Limits, RotaryTable
from vllm_eigen.plugin.self_attention import (
    EigenSelfAttention,
    Shared,
    TransformersSelfAttention,
)
from vllm_eigen.plugin.step_planner import StepPlanner, choose_kernels
from vllm_eigen.plugin.validation import check_attention, check_norms, check_positions
from vllm_eigen.plugin.vllm_api import (
    PPMissingLayer,
    VllmConfig,
    forget_layer,
    rotary_of,
    rotary_table,
    runs_transformers,
    stock_class,
)


class EigenModel(nn.Module):
    """What an Eigen class adds to the stock class, which follows it in the list of bases."""

    config: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        replace_attention(self, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint, and the bases beside it if they are in a folder of their own."""
        stock: Any = super()
        bases = self.config.eigen.get("bases")
        loaded: set[str] = stock.load_weights(
            chain(weights, base_tensors(bases)) if bases else weights
        )
        return loaded


@cache
def eigen_class(architecture: str) -> type[nn.Module]:
    """The class of an Eigen architecture, for example `EigenLlamaForCausalLM`.

    Raises:
        EngineError: no family has this architecture, or this vLLM does not serve its base.
    """
    for family in FAMILIES:
        if family.eigen_architecture == architecture:
            made = type(architecture, (EigenModel, stock_class(family.architecture)), {})
            made.__module__ = __name__
            return made
    raise EngineError(f"{architecture} is not an Eigen architecture")


def replace_attention(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Put Eigen attention into every compressed layer that this pipeline stage holds."""
    eigen = eigen_config(vllm_config)
    check_supported(eigen, vllm_config)
    family = family_of(vllm_config.model_config.hf_config.to_dict())
    check_norms(family, vllm_config.parallel_config.tensor_parallel_size)
    kernels = choose_kernels(torch.get_default_device().type)
    check_attention(eigen, vllm_config, kernels)
    limits = Limits(
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_seq_len=vllm_config.model_config.max_model_len,
        device=torch.get_default_device(),
    )
    latents = tuple(
        Latents(ranks.rank_k, ranks.rank_v, ranks.key_code, ranks.value_code)
        for ranks in eigen.layers
    )
    planner = StepPlanner(kernels, limits, latents)
    shared = Shared(family, eigen, vllm_config, planner)
    tables: dict[nn.Module, RotaryTable] = {}  # vLLM's layers share one rotary module
    layers: Any = model.get_submodule(f"{family.decoder}.{family.layers}")
    kind = TransformersSelfAttention if runs_transformers(model) else EigenSelfAttention
    for ranks, index in zip(eigen.layers, eigen.layer_indices, strict=True):
        layer = layers[index]
        if isinstance(layer, PPMissingLayer):
            continue
        stock = getattr(layer, family.attention)
        rotary_emb: Any = None
        if eigen.key_mode.has_rope:
            rotary_emb = rotary_of(stock, vllm_config, is_neox_style=not family.interleaved)
        table = None
        if eigen.key_mode.reconstructs_keys:
            if rotary_emb not in tables:
                tables[rotary_emb] = rotary_table(rotary_emb)
                check_positions(tables[rotary_emb], vllm_config.model_config.max_model_len)
            table = tables[rotary_emb]
        forget_layer(vllm_config, stock.attn)
        setattr(layer, family.attention, kind(stock, ranks, shared, rotary_emb, table))


def eigen_config(vllm_config: VllmConfig) -> EigenConfig:
    """The validated eigen section; a local checkpoint's tensors are checked against it too.

    Not with `--load-format dummy`, which needs none.
    """
    folder = Path(vllm_config.model_config.model)
    eigen = parse_config(vllm_config.model_config.hf_config.to_dict())
    stored = vllm_config.load_config.load_format != "dummy"
    if stored and folder.is_dir() and eigen.bases is None:
        return validate(folder)
    return eigen


def check_supported(eigen: EigenConfig, vllm_config: VllmConfig) -> None:
    """Refuse what cannot work on this checkpoint, before anything is loaded.

    Raises:
        UsageError: names the option and what to use instead.
    """
    check_cache_dtype(eigen, vllm_config.cache_config.cache_dtype)
    if vllm_config.lora_config is not None and eigen.projections.folds_values:
        raise UsageError(
            "LoRA adapters are trained on the base projections, which a folded checkpoint no "
            "longer has; serve the base model with --eigen-bases instead"
        )
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    apart = not eigen.projections.folds_values and eigen.head_group > 1
    if apart and eigen.num_latent_heads % tp_size:
        raise UsageError(
            f"{eigen.num_latent_heads} latent heads of {eigen.head_group} KV heads cannot be split "
            f"over {tp_size} ranks beside untouched projections; calibrate with --head-group 1"
        )
    for name, heads in (
        ("query heads", eigen.num_heads),
        ("KV heads", eigen.num_kv_heads),
        ("latent heads", eigen.num_latent_heads),
    ):
        if heads % tp_size and (name == "query heads" or tp_size % heads):
            raise UsageError(f"{heads} {name} cannot be split over {tp_size} ranks")


def base_tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a `bases.safetensors`."""
    with safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            yield name, tensors.get_tensor(name)
