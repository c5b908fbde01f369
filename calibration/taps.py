"""Hooks on the attention of one decoder layer: see its queries, keys and values, or change them.

The streaming pass captures what the statistics sum; the rank rules and the evaluation replace
keys and values by their low-rank reconstructions, which is mathematically the compressed model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from calibration.fold import Maps
from calibration.methods.base import Batch
from calibration.moments import rotate
from vllm_eigen.families import Family, Geometry, KeyMode

Act = Callable[[torch.Tensor], torch.Tensor | None]
Part = Literal["key", "value"]
Latents = Callable[[Part, torch.Tensor], torch.Tensor]
"""Stands in the cache's place: given the latents of keys or of values, it returns what is read
back. The shape is any, the last dimension is the rank."""


@contextlib.contextmanager
def capture(
    layer: nn.Module, family: Family, geometry: Geometry, sink: Callable[[Batch], None]
) -> Iterator[None]:
    """While open, every forward of `layer` hands `sink` the batch its attention saw."""
    attention: Any = layer.get_submodule(family.attention)
    seen: dict[str, Any] = {}
    o_proj: Any = attention.get_submodule(family.o_proj).weight.detach()
    o_proj = o_proj.reshape(o_proj.shape[0], -1, geometry.head_size)

    def tables(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["cos"], seen["sin"] = kwargs.get("position_embeddings") or (None, None)

    def context(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["context"] = heads(args[0])

    def finish(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # transformers' eager attention returns (output, probabilities) in every family.
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        sink(Batch(**seen, weights=weights, o_proj=o_proj))
        seen.clear()

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.detach().reshape(*x.shape[:2], -1, geometry.head_size)

    def keep(name: str) -> Act:
        def store(x: torch.Tensor) -> None:
            seen[name] = heads(x)

        return store

    with contextlib.ExitStack() as stack:
        stack.callback(attention.register_forward_pre_hook(tables, with_kwargs=True).remove)
        acts = {name: keep(name) for name in ("query", "key", "value")}
        stack.enter_context(_tapped(attention, family, acts))
        stack.callback(
            attention.get_submodule(family.o_proj).register_forward_pre_hook(context).remove
        )
        stack.callback(attention.register_forward_hook(finish).remove)
        yield


@contextlib.contextmanager
def compress(
    layer: nn.Module,
    family: Family,
    geometry: Geometry,
    key_mode: KeyMode,
    key: Maps | None,
    value: Maps | None,
    latents: Latents | None = None,
) -> Iterator[None]:
    """While open, `layer` computes with keys and values that went through low rank; None skips.

    Args:
        latents: what the cache makes of them; None keeps them as they are.
    """
    attention = layer.get_submodule(family.attention)
    tables: dict[str, torch.Tensor | None] = {"cos": None, "sin": None}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables["cos"], tables["sin"] = kwargs.get("position_embeddings") or (None, None)

    def through(part: Part, maps: Maps, rotated: bool) -> Act:
        cache = partial(latents, part) if latents else None

        def replace(x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(*x.shape[:2], -1, geometry.head_size)
            if rotated:
                turned = project(rotate(rows, tables["cos"], tables["sin"]), maps, cache)
                rows = rotate(turned, tables["cos"], tables["sin"], back=True)
            else:
                rows = project(rows, maps, cache)
            return rows.reshape(x.shape)

        return replace

    with contextlib.ExitStack() as stack:
        stack.callback(attention.register_forward_pre_hook(see, with_kwargs=True).remove)
        acts: dict[str, Act] = {}
        if key is not None:
            acts["key"] = through("key", key, key_mode == "post-rope")
        if value is not None:
            acts["value"] = through("value", value, False)
        stack.enter_context(_tapped(attention, family, acts))
        yield


def project(
    rows: torch.Tensor,
    maps: Maps,
    cache: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Encode, cache and decode [batch, length, num_kv_heads, head_size]."""
    encoder, decoder = (item.to(device=rows.device, dtype=rows.dtype) for item in maps)
    latent = rows.reshape(*rows.shape[:2], encoder.shape[0], encoder.shape[1])
    if cache is None:
        result = torch.einsum("blni,nir,nrj->blnj", latent, encoder, decoder)
    else:
        latent = cache(torch.einsum("blni,nir->blnr", latent, encoder))
        result = torch.einsum("blnr,nrj->blnj", latent, decoder)
    return result.reshape(rows.shape)


@contextlib.contextmanager
def _tapped(attention: Any, family: Family, acts: Mapping[str, Act]) -> Iterator[None]:
    """While open, call acts on query, key and value; what one returns takes their place."""
    paths = {
        "query": family.q_norm or family.q_proj,
        "key": family.k_norm or family.k_proj,
        "value": family.v_proj,
    }
    clip = getattr(attention, "clip_qkv", None)

    def on_one(act: Act) -> Callable[..., torch.Tensor | None]:
        return lambda module, args, output: act(output)

    def on_fused(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if clip:
            output = output.clamp(-clip, clip)
        parts = dict(zip(paths, output.chunk(3, dim=-1), strict=True))
        for name, act in acts.items():
            changed = act(parts[name])
            parts[name] = parts[name] if changed is None else changed
        return torch.cat(list(parts.values()), dim=-1)

    with contextlib.ExitStack() as stack:
        if family.qkv_proj:
            fused = attention.get_submodule(family.qkv_proj)
            stack.callback(fused.register_forward_hook(on_fused).remove)
            if clip:
                # Clipped above: what the acts return must not be clipped again.
                stack.callback(setattr, attention, "clip_qkv", clip)
                attention.clip_qkv = None
        else:
            for name, act in acts.items():
                module = attention.get_submodule(paths[name])
                stack.callback(module.register_forward_hook(on_one(act)).remove)
        yield
