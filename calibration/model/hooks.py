# SPDX-License-Identifier: Apache-2.0
"""Hooks on the attention of one decoder layer: read its queries, keys and values, or compress them.

The streaming pass captures what the statistics sum. `compress` replaces keys and values by their
low-rank reconstructions, which is mathematically the compressed model: rank allocation, the refit
and measurements use it on layers that are loaded one by one, `compressed` on a whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from vllm_eigen.calibration.methods.basis import LayerMaps, Maps
from vllm_eigen.calibration.model.fold import latent_offset
from vllm_eigen.calibration.statistics.batch import Batch
from vllm_eigen.calibration.statistics.rotary import Rotation, rotate
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.checkpoint.families import Family, Geometry
from vllm_eigen.checkpoint.modes import KeyMode
from vllm_eigen.kernels import coding

Hook = Callable[[torch.Tensor], torch.Tensor | None]
"""Is called with the queries, keys or values of all heads; a tensor it returns replaces them."""
Part = Literal["key", "value"]
SimulatedCache = Callable[[Part, torch.Tensor], torch.Tensor]
"""Returns what attention reads back for the latents, [..., rank], that were written."""
LayerCache = Callable[[LayerRanks], SimulatedCache]
"""Makes the cache of a layer from its ranks and scales."""


@dataclass(frozen=True)
class Offset:
    """What is added on the way through the latents; None adds nothing.

    Attributes:
        latent: to the latents, [num_latent_heads, rank].
        full: to what is reconstructed of them, [num_kv_heads, head_size].
    """

    latent: torch.Tensor | None = None
    full: torch.Tensor | None = None

    @classmethod
    def of(cls, offset: torch.Tensor | None, maps: Maps) -> Offset | None:
        """That of k' = (k - o) E and k_hat = k' D + o, with o [num_kv_heads, head_size]."""
        return None if offset is None else cls(-latent_offset(offset, maps[0]), offset)


@contextlib.contextmanager
def capture(
    layer: nn.Module, family: Family, geometry: Geometry, sink: Callable[[Batch], None]
) -> Iterator[None]:
    """While open, every forward of `layer` calls `sink` with the batch its attention saw."""
    attention: Any = layer.get_submodule(family.attention)
    seen: dict[str, Any] = {}
    o_proj: Any = attention.get_submodule(family.o_proj).weight.detach()
    o_proj = o_proj.reshape(o_proj.shape[0], -1, geometry.head_size)

    def context(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["context"] = heads(args[0])

    def finish(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # transformers' eager attention returns (output, probabilities) in every family.
        probs = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        sink(Batch(**seen, probs=probs, o_proj=o_proj))
        seen.clear()

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.detach().reshape(*x.shape[:2], -1, geometry.head_size)

    def keep(name: str) -> Hook:
        def store(x: torch.Tensor) -> None:
            seen[name] = heads(x)

        return store

    with contextlib.ExitStack() as stack:
        stack.enter_context(_hook_rotation(attention, family, seen))
        hooks = {name: keep(name) for name in ("query", "key", "value")}
        stack.enter_context(_hook_heads(attention, family, geometry, hooks))
        stack.callback(
            attention.get_submodule(family.o_proj).register_forward_pre_hook(context).remove
        )
        stack.callback(attention.register_forward_hook(finish).remove)
        yield


@contextlib.contextmanager
def tap(layer: nn.Module, family: Family, geometry: Geometry) -> Iterator[dict[str, Any]]:
    """While open, a forward of `layer` leaves in the dictionary the `key` and `value` of all heads,
    as `capture` gives them but in the graph, and the `rotation` or None."""
    attention: Any = layer.get_submodule(family.attention)
    seen: dict[str, Any] = {}
    hooks = {name: partial(seen.__setitem__, name) for name in ("key", "value")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_hook_rotation(attention, family, seen))
        stack.enter_context(_hook_heads(attention, family, geometry, hooks))
        yield seen


def compress(
    layer: nn.Module,
    family: Family,
    geometry: Geometry,
    key_mode: KeyMode,
    key: Maps | None,
    value: Maps | None,
    cache: SimulatedCache | None = None,
    *,
    key_offset: Offset | None = None,
    value_offset: Offset | None = None,
) -> contextlib.ExitStack:
    """Make `layer` compute with keys and values that went through low rank; None skips either.

    Args:
        cache: what attention reads back for the latents; None: the latents themselves.
        key_offset, value_offset: what is added to the latents, and to what is reconstructed.

    Returns:
        A context manager that removes the hooks when left; without it they stay.
    """
    attention = layer.get_submodule(family.attention)
    seen: dict[str, Any] = {}

    def through(part: Part, maps: Maps, offset: Offset | None, rotated: bool) -> Hook:
        read_back = partial(cache, part) if cache else None

        def replace(x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(*x.shape[:2], -1, geometry.head_size)
            if rotated:
                rows = rotate(rows, seen["rotation"])
                rows = project(rows, maps, read_back, offset)
                rows = rotate(rows, seen["rotation"], back=True)
            else:
                rows = project(rows, maps, read_back, offset)
            return rows.reshape(x.shape)

        return replace

    hooks: dict[str, Hook] = {}
    if key is not None:
        hooks["key"] = through("key", key, key_offset, key_mode.caches_rotated_keys)
    if value is not None:
        hooks["value"] = through("value", value, value_offset, False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_hook_rotation(attention, family, seen))
        stack.enter_context(_hook_heads(attention, family, geometry, hooks))
        return stack.pop_all()


def compress_layer(
    layer: nn.Module,
    family: Family,
    geometry: Geometry,
    key_mode: KeyMode,
    maps: LayerMaps,
    cache: SimulatedCache | None = None,
) -> contextlib.ExitStack:
    """`compress` with all maps and offsets of a layer."""
    return compress(
        layer,
        family,
        geometry,
        key_mode,
        maps.key,
        maps.value,
        cache,
        key_offset=Offset.of(maps.key_offset, maps.key),
        value_offset=Offset.of(maps.value_offset, maps.value),
    )


def coded_cache(ranks: LayerRanks) -> SimulatedCache | None:
    """What a layer reads back from a cache of codes, bit for bit as the kernels define it; None
    where its latents are not coded."""
    codes = {"key": ranks.key_code, "value": ranks.value_code}

    def read_back(part: Part, latents: torch.Tensor) -> torch.Tensor:
        code = codes[part]
        assert code is not None
        return coding.decode(*coding.encode(latents, code), code).to(latents)

    return read_back if ranks.coded else None


def project(
    rows: torch.Tensor,
    maps: Maps,
    read_back: Callable[[torch.Tensor], torch.Tensor] | None = None,
    offset: Offset | None = None,
) -> torch.Tensor:
    """Down-project, cache and reconstruct [batch, length, num_kv_heads, head_size]."""
    down, up = (item.to(device=rows.device, dtype=rows.dtype) for item in maps)
    heads = rows.reshape(*rows.shape[:2], down.shape[0], down.shape[1])
    if read_back is None and offset is None:
        return torch.einsum("blni,nir,nrj->blnj", heads, down, up).reshape(rows.shape)
    latents = torch.einsum("blni,nir->blnr", heads, down)
    if offset is not None and offset.latent is not None:
        latents = latents + offset.latent.to(latents)
    if read_back is not None:
        latents = read_back(latents)
    result = torch.einsum("blnr,nrj->blnj", latents, up).reshape(rows.shape)
    if offset is not None and offset.full is not None:
        result = result + offset.full.to(result)
    return result


def _hook_rotation(
    attention: Any, family: Family, seen: dict[str, Any]
) -> contextlib.AbstractContextManager[Any]:
    """Keep the rotation of each forward call under `rotation`; None without RoPE."""

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables = kwargs.get("position_embeddings")
        if not tables:
            seen["rotation"] = None
            return
        # transformers repeats the angle of a pair for both of its dimensions.
        cos, sin = (table.chunk(2, dim=-1)[0] for table in tables)
        seen["rotation"] = Rotation(cos, sin, family.interleaved)

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    stack = contextlib.ExitStack()
    stack.callback(handle.remove)
    return stack


def _hook_heads(
    attention: Any, family: Family, geometry: Geometry, hooks: Mapping[str, Hook]
) -> contextlib.ExitStack:
    """Call hooks on the query, key and value of all heads, as they are before rotation.

    Returns:
        As `compress`.
    """
    paths = {
        "query": family.q_norm or family.q_proj,
        "key": family.k_norm or family.k_proj,
        "value": family.v_proj,
    }
    clip = getattr(attention, "clip_qkv", None)

    def on_one(hook: Hook) -> Callable[..., torch.Tensor | None]:
        return lambda module, args, output: hook(output)

    def on_heads(hook: Hook) -> Callable[..., torch.Tensor]:
        def call(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            # Given back in any case: gradients are asked for what the hook saw.
            rows = output.transpose(1, 2)
            changed = hook(rows)
            return (rows if changed is None else changed).transpose(1, 2)

        return call

    def on_fused(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if clip:
            output = output.clamp(-clip, clip)
        parts = dict(zip(paths, output.split(geometry.qkv_sizes, dim=-1), strict=True))
        for name, hook in hooks.items():
            changed = hook(parts[name])
            parts[name] = parts[name] if changed is None else changed
        return torch.cat(list(parts.values()), dim=-1)

    with contextlib.ExitStack() as stack:
        if family.qkv_proj:
            fused = attention.get_submodule(family.qkv_proj)
            stack.callback(fused.register_forward_hook(on_fused).remove)
            if clip:
                # Clipped above: what the hooks return must not be clipped again.
                stack.callback(setattr, attention, "clip_qkv", clip)
                attention.clip_qkv = None
        else:
            for name, hook in hooks.items():
                module = attention.get_submodule(paths[name])
                normed = family.heads_first and paths[name] in (family.q_norm, family.k_norm)
                called = on_heads(hook) if normed else on_one(hook)
                stack.callback(module.register_forward_hook(called).remove)
        return stack.pop_all()
