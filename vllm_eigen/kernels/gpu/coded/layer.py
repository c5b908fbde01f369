# SPDX-License-Identifier: Apache-2.0
"""One prepared layer of codes on a GPU: the launches of its cache write and of its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels.gpu.checks import check_write, typed_cache
from vllm_eigen.kernels.gpu.coded.attention import coded_attention_kernel
from vllm_eigen.kernels.gpu.coded.layout import CodeTile, code_tiles, code_units
from vllm_eigen.kernels.gpu.coded.write import coded_write_kernel
from vllm_eigen.kernels.gpu.layer import PROJECTED_TOKENS, Call, GpuLayer, precision
from vllm_eigen.kernels.gpu.padding import MIN_VALUE_UNITS, Padding
from vllm_eigen.kernels.gpu.tiles import MIN_DOT, Tile, padded

WRITTEN_TOKENS = 16
"""Tokens a program of the cache write that does not project: a group of one block at best."""


def key_tiles(padding: Padding) -> tuple[CodeTile, ...]:
    """Those of a key's codes."""
    return code_tiles(padding.key, padding.key_two, MIN_DOT)


def value_tiles(padding: Padding) -> tuple[CodeTile, ...]:
    """Those of a value's codes."""
    return code_tiles(padding.value, padding.value_two, MIN_VALUE_UNITS)


@dataclass(frozen=True, eq=False)
class CodedGpuLayer(GpuLayer):
    """See `interface.PreparedLayer`. The rows of `packed.basis` are those of `key_tiles`."""

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """See `interface.PreparedLayer.write_cache`."""
        spec, cache = self.spec, typed_cache(kv_cache, self.spec)
        num_tokens = slot_mapping.shape[0]
        check_write(spec, key, value, num_tokens)
        if num_tokens == 0:
            return
        projection = spec.down_projection
        basis = projection.key if projection else None
        value_basis = projection.value if projection else None
        tokens = WRITTEN_TOKENS if projection is None else PROJECTED_TOKENS
        key_code, value_code = self._codes
        widest = self.sizes.widest
        coded_write_kernel[(triton.cdiv(num_tokens, tokens), spec.num_kv_heads, 2)](
            *(key, value),
            # Placeholders where nothing is projected, which begin on 16 bytes as bases do.
            *(cache if basis is None else basis, cache if value_basis is None else value_basis),
            projection.key_bias if projection else None,
            None if value_basis is None or projection is None else projection.value_bias,
            *(cache, slot_mapping, num_tokens),
            *(key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
            *(cache.stride(0), cache.stride(1)),
            *(*code_units(key_code), *code_units(value_code)),
            *(key_code.scale_floor, value_code.scale_floor),
            key_size=0 if basis is None else key.shape[2],
            value_size=0 if value_basis is None else value.shape[2],
            projects_keys=basis is not None,
            projects_values=value_basis is not None,
            **self._scaled,
            # Every unit once.
            key_tiles=code_tiles(widest.key, padded(widest.key_two), MIN_DOT),
            value_tiles=code_tiles(widest.value, padded(widest.value_two), MIN_DOT),
            block_size=cache.shape[2],
            BLOCK_TOKENS=tokens,
            BLOCK_D=min(64, padded(max(key.shape[2], value.shape[2]))) if projection else MIN_DOT,
            precision=precision(key.dtype),
            num_warps=4,
            num_stages=1,
        )

    def _attend(self, call: Call, tile: Tile, *, is_decode: bool) -> None:
        key_code, value_code = self._codes
        padding = self.sizes.padding
        coded_attention_kernel[self._grid(call, tile, is_decode)](
            *self._operands(call),
            self._partial_width,
            *self._strides(call),
            *(*code_units(key_code), *code_units(value_code)),
            **self._options(call, tile, is_decode),
            **self._scaled,
            key_tiles=key_tiles(padding),
            value_tiles=value_tiles(padding),
            streams=tile.streams,
            # Only read with reconstructed keys: one compiled kernel serves all ranks otherwise.
            head_size=call.query.shape[2] if self.packed else 0,
        )

    @property
    def _partial_width(self) -> int:
        return -(-self.spec.rank_v // MIN_DOT) * MIN_DOT

    @property
    def _codes(self) -> tuple[Code, Code]:
        """Those of keys and values."""
        key, value = self.spec.key_code, self.spec.value_code
        assert key is not None
        assert value is not None
        return key, value

    @property
    def _scaled(self) -> dict[str, Any]:
        """Whether tokens have scales."""
        key, value = self._codes
        return {"key_scaled": key.token_scale, "value_scaled": value.token_scale}
