"""Hooks on the attention of one decoder layer: see its queries, keys and values, or change them.

The streaming pass captures what the statistics sum; the rank rules and the evaluation replace
keys and values by their low-rank reconstructions, which is mathematically the compressed model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from calibration.fold import Maps
from calibration.methods.base import Batch
from calibration.moments import rotate
from vllm_eigen.families import Family, Geometry, KeyMode


@contextlib.contextmanager
def capture(
    layer: nn.Module, family: Family, geometry: Geometry, sink: Callable[[Batch], None]
) -> Iterator[None]:
    """While open, every forward of `layer` hands `sink` the batch its attention saw."""
    attention = layer.get_submodule(family.attention)
    seen: dict[str, Any] = {}
    o_proj = attention.get_submodule(family.o_proj).weight.detach()
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

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        def store(x: torch.Tensor) -> None:
            seen[name] = heads(x)

        return store

    with contextlib.ExitStack() as stack:
        stack.callback(attention.register_forward_pre_hook(tables, with_kwargs=True).remove)
        for name in ("query", "key", "value"):
            stack.callback(_on(attention, family, name, keep(name)))
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
) -> Iterator[None]:
    """While open, `layer` computes with keys and values that went through low rank; None skips."""
    attention = layer.get_submodule(family.attention)
    tables: dict[str, torch.Tensor | None] = {"cos": None, "sin": None}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables["cos"], tables["sin"] = kwargs.get("position_embeddings") or (None, None)

    def through(maps: Maps, rotated: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        def replace(x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(*x.shape[:2], -1, geometry.head_size)
            if rotated:
                turned = project(rotate(rows, tables["cos"], tables["sin"]), maps)
                rows = rotate(turned, tables["cos"], tables["sin"], back=True)
            else:
                rows = project(rows, maps)
            return rows.reshape(x.shape)

        return replace

    with contextlib.ExitStack() as stack:
        stack.callback(attention.register_forward_pre_hook(see, with_kwargs=True).remove)
        if key is not None:
            replace = through(key, key_mode == "post-rope")
            stack.callback(_on(attention, family, "key", replace))
        if value is not None:
            stack.callback(_on(attention, family, "value", through(value, False)))
        yield


def project(rows: torch.Tensor, maps: Maps) -> torch.Tensor:
    """Encode and decode [batch, length, num_kv_heads, head_size]."""
    encoder, decoder = (item.to(device=rows.device, dtype=rows.dtype) for item in maps)
    latent = rows.reshape(*rows.shape[:2], encoder.shape[0], encoder.shape[1])
    result = torch.einsum("blni,nir,nrj->blnj", latent, encoder, decoder)
    return result.reshape(rows.shape)


def _on(
    attention: nn.Module,
    family: Family,
    name: str,
    act: Callable[[torch.Tensor], torch.Tensor | None],
) -> Callable[[], None]:
    """Call `act` on the query, key or value; what it returns, if anything, takes its place."""
    path = {"query": family.q_proj, "key": family.k_proj, "value": family.v_proj}[name]

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        return act(output)

    return attention.get_submodule(path).register_forward_hook(hook).remove
