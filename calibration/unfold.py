"""Turn an Eigen checkpoint into an ordinary model of the base architecture, equal in output.

Latents are multiplied by their bases (`factors`), or hooks do so where bases stand beside the base
model's projections. The result runs in plain transformers and is the reference of the compressed
model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from calibration.factors import read_keys, read_values
from calibration.fold import Maps, Tensors, per_latent, repeat
from calibration.source import Source, Weights
from calibration.taps import compress
from vllm_eigen import checkpoint
from vllm_eigen.checkpoint import (
    KEY_BASIS,
    KEY_ENCODER,
    VALUE_BASIS,
    VALUE_ENCODER,
    EigenConfig,
)
from vllm_eigen.errors import CheckpointError
from vllm_eigen.families import Family, family_of

_BASES = (KEY_ENCODER, KEY_BASIS, VALUE_ENCODER, VALUE_BASIS)


def unfold(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and float64/stored-type tensors of the equivalent base-architecture model.

    Raises:
        CheckpointError: the checkpoint is damaged, or of a key mode that the base architecture
            cannot express.
    """
    eigen = checkpoint.validate(folder)
    if eigen.projections != "folded":
        raise CheckpointError(
            f"{folder}: keys that pass a norm, a clip or the rotary embedding before they are "
            "compressed have no ordinary equivalent; use `load_reference`"
        )
    return _without_bases(folder)


def load_reference(folder: Path, device: torch.device | str = "cpu") -> Any:
    """The compressed model as a transformers model of the base architecture, in float32.

    Where bases stand beside the projections, hooks apply them.
    """
    model = bare_model(folder, device)
    config, eigen = checkpoint.read_config(folder)
    if eigen.projections == "folded":
        return model
    family = family_of(config)
    weights = Weights(folder, family)
    hooks = contextlib.ExitStack()
    for index in range(len(eigen.layers)):
        hooks.enter_context(
            compress(
                model.get_submodule(f"{family.decoder}.{family.layers}.{index}"),
                family,
                family.geometry(config),
                eigen.key_mode,
                *read_bases(weights, family.attention_path(index), eigen),
            )
        )
    model.eigen_hooks = hooks  # They live as long as the model.
    return model


def bare_model(folder: Path, device: torch.device | str = "cpu") -> Any:
    """A checkpoint's transformers model in float32, without the bases that stand beside it."""
    checkpoint.validate(folder)
    return _build(*_without_bases(folder), device)


def read_bases(weights: Tensors, path: str, eigen: EigenConfig) -> tuple[Maps | None, Maps | None]:
    """The maps of keys and of values that stand beside the attention module at `path`, float32."""

    def maps(encoder: str, basis: str) -> Maps:
        decoder = per_latent(weights.get(f"{path}.{basis}"), eigen.num_latent_heads)
        return weights.get(f"{path}.{encoder}").float(), decoder.float()

    return (
        None if eigen.projections == "folded" else maps(KEY_ENCODER, KEY_BASIS),
        maps(VALUE_ENCODER, VALUE_BASIS) if eigen.projections == "untouched" else None,
    )


def load_base(source: Source, device: torch.device | str = "cpu") -> Any:
    """The whole base model in float32."""
    tensors = {name: source.weights.get(name) for name in source.weights}
    return _build(dict(source.config), tensors, device)


def write_unfolded(folder: Path, output: Path) -> None:
    """Write the equivalent model as an ordinary Hugging Face folder, in float32."""
    from safetensors.torch import save_file

    from calibration.write import copy_files
    from vllm_eigen.files import atomic_directory

    config, tensors = unfold(folder)
    for name in ("torch_dtype", "dtype"):
        config.pop(name, None)
    config["dtype"] = "float32"
    with atomic_directory(output) as work:
        copy_files(folder, work)
        (work / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        ready = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        save_file(ready, work / "model.safetensors", metadata={"format": "pt"})


def _base_config(config: dict[str, Any], family: Family) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name != "eigen"}
    return {**kept, "architectures": [family.architecture]}


def _build(config: dict[str, Any], tensors: dict[str, torch.Tensor], device: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in config.items() if name != "model_type"}
    made: Any = AutoConfig.for_model(config["model_type"], **settings)
    build: Any = AutoModelForCausalLM.from_config
    model = build(made, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(
        {name: tensor.float() for name, tensor in tensors.items()}, strict=False
    )
    tied = {"lm_head.weight"} if made.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        names = sorted((set(missing) - tied) | set(unexpected))
        raise CheckpointError(f"tensors do not fit {config['architectures'][0]}: {names[0]}")
    model.tie_weights()
    return model.to(device).eval()


def _without_bases(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of the base-architecture model, what is folded at full size."""
    config, eigen = checkpoint.read_config(folder)
    family = family_of(config)
    weights = Weights(folder, family)
    tensors = dict(_attention_tensors(weights, family, eigen))
    fused = family.qkv_proj and eigen.projections == "folded"
    parts = (family.q_proj, family.k_proj, family.v_proj) if fused else ()
    dropped = tuple(f".{item}" for item in (*_BASES, *(f"{part}.weight" for part in parts)))
    for name in weights:
        if name not in tensors and not name.endswith(dropped):
            tensors[name] = weights.get(name)
    return _base_config(config, family), tensors


def _attention_tensors(
    weights: Weights, family: Family, eigen: EigenConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Full-size projections in the place of folded ones, float64, layer by layer."""
    for index in range(len(eigen.layers)):
        path = family.attention_path(index)
        where = weights, path, family, eigen, index
        found: dict[str, torch.Tensor] = {}
        if eigen.projections == "folded":
            keys = read_keys(*where)
            found[family.q_proj] = keys.q
            found[family.k_proj] = keys.basis.mT @ repeat(keys.k, eigen.num_kv_heads)
        if eigen.projections != "untouched":
            values = read_values(*where)
            found[family.v_proj] = values.basis.mT @ repeat(values.v, eigen.num_kv_heads)
            yield f"{path}.{family.o_proj}.weight", values.o.flatten(1)
        if family.qkv_proj and found:
            fused = torch.cat([item[..., :-1].flatten(0, 1) for item in found.values()])
            yield f"{path}.{family.qkv_proj}.weight", fused
            continue
        for name, tensor in found.items():
            yield f"{path}.{name}.weight", tensor[..., :-1].flatten(0, 1)
            if f"{path}.{name}.bias" in weights:
                yield f"{path}.{name}.bias", tensor[..., -1].flatten()
