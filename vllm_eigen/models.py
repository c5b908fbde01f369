"""vLLM models of the Eigen architectures: the stock model with its attention modules replaced.

A class per family is made from the family's description; nothing of vLLM's models is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from vllm_eigen.attention import EigenSelfAttention
from vllm_eigen.checkpoint import EigenConfig, parse_config, validate
from vllm_eigen.errors import UsageError
from vllm_eigen.families import FAMILIES, Family
from vllm_eigen.vllm_internals import PPMissingLayer, VllmConfig, forget_layer, stock_model


def replace_attention(model: nn.Module, family: Family, vllm_config: VllmConfig) -> None:
    """Put Eigen attention into every decoder layer this pipeline stage holds."""
    eigen = eigen_config(vllm_config)
    check_supported(eigen, vllm_config)
    layers: Any = model.get_submodule(f"{family.decoder}.{family.layers}")
    for index, layer in enumerate(layers):
        if isinstance(layer, PPMissingLayer):
            continue
        stock = getattr(layer, family.attention)
        forget_layer(vllm_config, stock.attn)
        made = EigenSelfAttention(stock, family, eigen, index, vllm_config)
        setattr(layer, family.attention, made)


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
    if vllm_config.lora_config is not None and eigen.projections != "untouched":
        raise UsageError(
            "LoRA adapters are trained on the base projections, which a folded checkpoint no "
            "longer has; serve the base model with --eigen-bases instead"
        )
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    apart = eigen.projections == "untouched" and eigen.head_group > 1
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


def eigen_section(model: Any) -> dict[str, Any]:
    """The raw eigen section of a model's configuration."""
    section: dict[str, Any] = model.config.eigen
    return section


def _model_class(family: Family) -> type[nn.Module]:
    """The Eigen variant of one stock model class."""
    stock: Any = stock_model(family.architecture)

    def __init__(self: nn.Module, *, vllm_config: VllmConfig, prefix: str = "") -> None:  # noqa: N807
        stock.__init__(self, vllm_config=vllm_config, prefix=prefix)
        replace_attention(self, family, vllm_config)

    def load_weights(
        self: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> set[str] | None:
        bases = eigen_section(self).get("bases")
        found: set[str] | None = stock.load_weights(
            self, chain(weights, base_tensors(bases)) if bases else weights
        )
        return found

    attributes = {
        "__init__": __init__,
        "load_weights": load_weights,
        "__module__": __name__,
        "__doc__": f"{family.architecture} with Eigen attention.",
    }
    return type(family.eigen_architecture, (stock,), attributes)


_CLASSES = {family.eigen_architecture: family for family in FAMILIES}


def __getattr__(name: str) -> type[nn.Module]:
    """Make `EigenLlamaForCausalLM` and its kin on first use; vLLM imports them by name."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    made = _model_class(_CLASSES[name])
    globals()[name] = made
    return made
