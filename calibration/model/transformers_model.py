# SPDX-License-Identifier: Apache-2.0
"""transformers models in float32: from a configuration alone, and with their weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from vllm_eigen.calibration.model.source import Source
from vllm_eigen.checkpoint.families import family_of
from vllm_eigen.common.errors import CheckpointError, InputError, first_line


def auto_config(source: Source) -> Any:
    """The model's configuration as transformers reads it.

    Raises:
        InputError: it is not usable.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder)
    except Exception as error:
        raise InputError(
            f"{source.folder}/config.json is not usable: {first_line(error)}"
        ) from error


def auto_model(config: Any, eager: bool) -> Any:
    """A transformers model in float32; eager attention is as written, returns its probabilities."""
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    options = {"attn_implementation": "eager"} if eager else {}
    # Experts one by one: what multiplies them at once has demands on types and layouts.
    return build(config, dtype=torch.float32, experts_implementation="eager", **options)


def load_base(source: Source, device: torch.device | str = "cpu") -> Any:
    """The whole base model in float32."""
    tensors = {name: source.tensors.get(name) for name in source.tensors}
    return load_model(source.config, tensors, device)


def load_model(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    device: torch.device | str = "cpu",
    biases: Collection[str] = (),
) -> Any:
    """A transformers model in float32 with these tensors, for inference.

    Args:
        config: as in `config.json`.
        biases: names of biases that its linear maps have, whatever the configuration says.

    Raises:
        CheckpointError: the tensors are not those of the configuration.
    """
    from transformers import AutoConfig

    settings = {name: value for name, value in config.items() if name != "model_type"}
    made: Any = AutoConfig.for_model(config["model_type"], **settings)
    model = auto_model(made, eager=family_of(config).eager_only)
    for name in biases:
        linear = model.get_submodule(name.rpartition(".")[0])
        linear.bias = nn.Parameter(torch.empty(linear.out_features))
    missing, unexpected = model.load_state_dict(
        {name: tensor.float() for name, tensor in tensors.items()}, strict=False
    )
    tied = {"lm_head.weight"} if made.tie_word_embeddings else set()
    if wrong := (set(missing) - tied) | set(unexpected):
        raise CheckpointError(f"tensors do not fit {config['architectures'][0]}: {min(wrong)}")
    model.tie_weights()
    return model.to(device).eval()
