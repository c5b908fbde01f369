# SPDX-License-Identifier: Apache-2.0
"""Coded checkpoints with made-up widths: random rotations, steps that fit the latents they give."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_eigen.calibration.export.write import eigen_config, write_bases, write_checkpoint
from vllm_eigen.calibration.methods.basis import LayerMaps, Maps
from vllm_eigen.calibration.model.hooks import Part, compress_layer
from vllm_eigen.calibration.model.source import Source, open_source
from vllm_eigen.calibration.model.transformers_model import load_base
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.checkpoint.modes import KeyMode

RANGE = 3.0
"""Standard deviations that the codes reach without a token scale; some latents are beyond."""


def coded_ranks(key: Code, value: Code) -> LayerRanks:
    """A layer's ranks by its codes."""
    return LayerRanks(rank_k=key.rank, rank_v=value.rank, key_code=key, value_code=value)


RANKS = [
    coded_ranks(Code(eight=4, four=8, two=16), Code(four=24, token_scale=True)),
    coded_ranks(
        Code(eight=8, four=16, token_scale=True, scale_floor=1.0),
        Code(four=32, token_scale=True, scale_floor=0.5),
    ),
]
"""Of two layers with heads of 32."""


def rotations(heads: int, size: int, rank: int, generator: torch.Generator) -> Maps:
    """Random orthonormal maps, float64."""
    noise = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
    encoder = torch.linalg.qr(noise)[0][:, :, :rank].contiguous()
    return encoder, encoder.mT.contiguous()


def with_steps(maps: Maps, steps: torch.Tensor) -> Maps:
    """The same maps with steps [num_latent_heads, rank] multiplied in."""
    return maps[0] / steps[:, None], maps[1] * steps[:, :, None]


class Spread:
    """Records the root mean square of a layer's latents; returns them unchanged."""

    def __init__(self) -> None:
        self.found: dict[Part, torch.Tensor] = {}

    def __call__(self, part: Part, latents: torch.Tensor) -> torch.Tensor:
        self.found[part] = latents.double().square().mean(dim=(0, 1)).sqrt()
        return latents

    def steps(self, part: Part, code: Code) -> torch.Tensor:
        """A step for each direction, [num_latent_heads, rank]."""
        largest = torch.tensor([(2**width - 1) / 2 for width in code.widths])
        return RANGE * self.found[part] / largest


def coded_maps(
    source: Source,
    ranks: Sequence[LayerRanks],
    key_mode: KeyMode,
    *,
    head_group: int = 1,
    offsets: bool = True,
    seed: int = 0,
) -> list[LayerMaps]:
    """Maps of every layer, with steps for the base model's own latents of random tokens."""
    geometry, family = source.geometry, source.family
    generator = torch.Generator().manual_seed(seed)
    heads, size = geometry.num_kv_heads // head_group, geometry.head_size * head_group
    made, spreads = [], []
    model: Any = load_base(source)
    tokens = torch.randint(3, source.vocab_size, (4, 48), generator=generator)
    with contextlib.ExitStack() as hooks:
        for index, layer in zip(family.compressed_layers(source.config), ranks, strict=True):

            def offset() -> torch.Tensor | None:
                shape = geometry.num_kv_heads, geometry.head_size
                noise = torch.randn(shape, generator=generator, dtype=torch.float64)
                return 0.5 * noise if offsets else None

            maps = LayerMaps(
                rotations(heads, size, layer.rank_k, generator),
                rotations(heads, size, layer.rank_v, generator),
                offset(),
                offset(),
            )
            made.append(maps)
            spreads.append(Spread())
            module = model.get_submodule(f"{family.decoder}.{family.layers}.{index}")
            hooks.enter_context(
                compress_layer(module, family, geometry, key_mode, maps, spreads[-1])
            )
        with torch.no_grad():
            model(tokens)
    found = []
    for maps, spread, layer in zip(made, spreads, ranks, strict=True):
        assert layer.key_code is not None
        assert layer.value_code is not None
        key = with_steps(maps.key, spread.steps("key", layer.key_code))
        value = with_steps(maps.value, spread.steps("value", layer.value_code))
        found.append(replace(maps, key=key, value=value))
    return found


def write_coded(
    base: Path,
    output: Path,
    ranks: Sequence[LayerRanks],
    key_mode: KeyMode | None = None,
    *,
    head_group: int = 1,
    offsets: bool = True,
    untouched: bool = False,
    bases_only: bool = False,
    seed: int = 0,
) -> list[LayerMaps]:
    """Write a coded checkpoint of a base model, and return its maps.

    Args:
        untouched: leave the projections as they are; `bases_only` leaves the model out too.
    """
    source = open_source(str(base))
    key_mode = key_mode or source.family.key_modes[0]
    maps = coded_maps(source, ranks, key_mode, head_group=head_group, offsets=offsets, seed=seed)
    eigen = eigen_config(
        source,
        ranks,
        key_mode=key_mode,
        method="made up",
        head_group=head_group,
        provenance={},
        bases_only=untouched or bases_only,
        key_offset=offsets,
        value_offset=offsets,
    )
    (write_bases if bases_only else write_checkpoint)(source, eigen, maps, output)
    return maps
