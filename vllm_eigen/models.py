"""vLLM models of the Eigen architectures: the stock model with its attention modules replaced.

A class per family is made from the family's description; nothing of vLLM's models is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vllm_eigen.attention import FoldedSelfAttention, UntouchedSelfAttention
from vllm_eigen.checkpoint import EigenConfig, parse_config, validate
from vllm_eigen.families import FAMILIES, Family
from vllm_eigen.vllm_internals import PPMissingLayer, VllmConfig, forget_layer, stock_model


def replace_attention(model: nn.Module, family: Family, vllm_config: VllmConfig) -> None:
    """Put Eigen attention into every decoder layer this pipeline stage holds."""
    eigen = eigen_config(vllm_config)
    replacement = (
        FoldedSelfAttention if eigen.projections == "folded" else UntouchedSelfAttention
    )
    layers = model.get_submodule(f"{family.decoder}.{family.layers}")
    for index, layer in enumerate(layers):
        if isinstance(layer, PPMissingLayer):
            continue
        stock = getattr(layer, family.attention)
        forget_layer(vllm_config, stock.attn)
        setattr(
            layer, family.attention, replacement(stock, family, eigen, index, vllm_config)
        )


def eigen_config(vllm_config: VllmConfig) -> EigenConfig:
    """The validated eigen section; a local checkpoint's tensors are checked against it too."""
    folder = Path(vllm_config.model_config.model)
    if folder.is_dir():
        return validate(folder)
    return parse_config(vllm_config.model_config.hf_config.to_dict())


def _model_class(family: Family) -> type[nn.Module]:
    """The Eigen variant of one stock model class."""
    stock: Any = stock_model(family.architecture)

    def __init__(self: nn.Module, *, vllm_config: VllmConfig, prefix: str = "") -> None:  # noqa: N807
        stock.__init__(self, vllm_config=vllm_config, prefix=prefix)
        replace_attention(self, family, vllm_config)

    # LoRA adapters are trained on the base model's projections, which no longer exist here.
    attributes = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"{family.architecture} with Eigen attention.",
        "supports_lora": False,
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
