# SPDX-License-Identifier: Apache-2.0
"""What attention kernels over the latent KV cache must do: the types that every backend shares.

A layer is prepared once, after its weights are loaded (`Kernels.prepare`). A scheduler step is
planned once (`Kernels.plan`); layers of equal `PlanGeometry` share the plan, whatever their ranks.
A prepared layer then writes its cache and attends with the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels.rope import RotaryTable

FP8_DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class ScoreOptions:
    """How a raw dot product becomes a softmax logit.

    logit = cap(scale * q.k) + slope * (t - p) for a key at position t and a query at p >= t.

    scale: 1 / sqrt(head size of the *original* model), not of the rank.
    alibi_slopes: float32 `[num_heads]`, or None.
    sliding_window: a query at p sees keys in (p - window, p]; None sees all of them.
    soft_cap: cap(x) = soft_cap * tanh(x / soft_cap); None leaves x alone.
    """

    scale: float
    alibi_slopes: torch.Tensor | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True, eq=False)
class KeyReconstruction:
    """How cached latents become rotary keys ("pre-rope" key mode, paper section 3.3).

    k_hat = k' @ key_basis + key_offset, then rotated by the token's own position.

    key_basis: `[num_reconstructed_heads, rank_k, head_size]`. With
        g = num_reconstructed_heads / num_kv_heads, latent head j serves the reconstructed heads
        j*g .. j*g + g - 1.
    rotary: the rotation; dimensions of a head past its rotary_dim pass unrotated.
    key_offset: `[num_reconstructed_heads, head_size]`, or None.
    """

    key_basis: torch.Tensor
    rotary: RotaryTable
    key_offset: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class DownProjection:
    """How keys and values become latents, where the projections do not make them: x' = x @ basis.

    key: `[num_kv_heads, key_size, rank_k]`.
    value: `[num_kv_heads, value_size, rank_v]`, or None where values come as latents.
    key_bias: `[num_kv_heads, rank_k]` added to the keys' latents, or None.
    value_bias: `[num_kv_heads, rank_v]` added to the values' latents where `value` makes them.
    """

    key: torch.Tensor
    value: torch.Tensor | None
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None

    def latents(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[num_tokens, num_kv_heads, size]` to `[.., rank]`, both."""
        key = (key.transpose(0, 1) @ self.key).transpose(0, 1)
        if self.key_bias is not None:
            key = key + self.key_bias
        if self.value is not None:
            value = (value.transpose(0, 1) @ self.value).transpose(0, 1)
            if self.value_bias is not None:
                value = value + self.value_bias
        return key, value


@dataclass(frozen=True)
class Latents:
    """What one layer caches of a head and token: ranks, and how they are coded in bits."""

    rank_k: int
    rank_v: int
    key_code: Code | None = None
    value_code: Code | None = None


@dataclass(frozen=True)
class PlanGeometry:
    """What a step's plan depends on besides the step. Ranks do not matter.

    num_key_heads: heads of the keys that queries are scored against: reconstructed heads where
        `reconstructs_keys`, otherwise the cache's num_kv_heads.
    block_size: tokens of a cache block.
    """

    num_heads: int
    num_kv_heads: int
    num_key_heads: int
    reconstructs_keys: bool
    block_size: int


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """All that is constant for one attention layer on one tensor-parallel rank.

    num_heads: query heads; num_kv_heads: heads in the cache.
    dtype: of queries, outputs and bases; cache_dtype: element type of the KV cache. It is `dtype`,
        or fp8 (float8_e4m3fn, float8_e5m2, or uint8 meaning e4m3), where a stored value stands for
        value * scale. k_scale and v_scale touch only fp8 caches.
    key_code, value_code: how latents are coded in bits (`checkpoint.codes`), both or neither. With
        them cache_dtype is uint8 and a cached latent stands for codes times token scale.
    reconstruction: None where cached keys are scored as they are.
    down_projection: None where keys and values come as latents.
    peers: latents of all layers of the model; kernels may pad so that few serve all of them.
    """

    num_heads: int
    num_kv_heads: int
    rank_k: int
    rank_v: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    scores: ScoreOptions
    k_scale: float = 1.0
    v_scale: float = 1.0
    reconstruction: KeyReconstruction | None = None
    down_projection: DownProjection | None = None
    key_code: Code | None = None
    value_code: Code | None = None
    peers: tuple[Latents, ...] = ()

    def __post_init__(self) -> None:
        """Raises KernelError for codes that do not fit the ranks or the cache."""
        key, value = self.key_code, self.value_code
        if key is None and value is None:
            return
        if key is None or value is None:
            raise KernelError("a layer codes both its keys and its values, or neither")
        if (key.rank, value.rank) != (self.rank_k, self.rank_v):
            raise KernelError(
                f"codes of {key.rank} and {value.rank} directions do not fit ranks {self.rank_k}"
                f" and {self.rank_v}"
            )
        if self.cache_dtype != torch.uint8:
            raise KernelError(f"a coded cache is of uint8, not {self.cache_dtype}")

    @property
    def latents(self) -> Latents:
        """What the layer caches of a head and token."""
        return Latents(self.rank_k, self.rank_v, self.key_code, self.value_code)

    @property
    def is_coded(self) -> bool:
        """Whether the cache holds codes. uint8 then does not mean fp8."""
        return self.key_code is not None

    @property
    def is_fp8(self) -> bool:
        """Whether the cache holds fp8 numbers, to which k_scale and v_scale belong."""
        return not self.is_coded and self.cache_dtype in FP8_DTYPES

    @property
    def key_width(self) -> int:
        """Elements of cache_dtype that one head and token's key takes in the cache."""
        return self.rank_k if self.key_code is None else self.key_code.num_bytes

    @property
    def value_width(self) -> int:
        """Elements of cache_dtype that one head and token's value takes in the cache."""
        return self.rank_v if self.value_code is None else self.value_code.num_bytes

    @property
    def query_size(self) -> int:
        """Width of a query head: rank_k, or the head size where keys are reconstructed."""
        if self.reconstruction is None:
            return self.rank_k
        return int(self.reconstruction.key_basis.shape[2])

    @property
    def written_sizes(self) -> tuple[int, int]:
        """Widths of a key and a value as `PreparedLayer.write_cache` takes them."""
        if (projection := self.down_projection) is None:
            return self.rank_k, self.rank_v
        value = self.rank_v if projection.value is None else projection.value.shape[1]
        return projection.key.shape[1], value

    @property
    def num_key_heads(self) -> int:
        """Heads of the keys that queries are scored against."""
        if self.reconstruction is None:
            return self.num_kv_heads
        return int(self.reconstruction.key_basis.shape[0])

    def plan_geometry(self, block_size: int) -> PlanGeometry:
        """What this layer's plan depends on, with cache blocks of `block_size` tokens."""
        return PlanGeometry(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            num_key_heads=self.num_key_heads,
            reconstructs_keys=self.reconstruction is not None,
            block_size=block_size,
        )


@dataclass(frozen=True, eq=False)
class Step:
    """One scheduler step, as vLLM's CommonAttentionMetadata gives it.

    query_start_loc: int32 `[num_seqs + 1]`, where each sequence's queries begin.
    seq_lens: int32 `[num_seqs]`, cached tokens, this step's included. Query token i of the n of a
        sequence sits at position seq_len - n + i.
    block_table: int32 `[num_seqs, max_blocks]`.
    num_actual_tokens: query tokens without padding.
    max_query_len, max_seq_len: upper bounds known on the host (in a captured graph: for all of its
        replays); None is unknown. They may spare work and change no result.
    query_start_loc_cpu: the same as query_start_loc on the host, or None. It may spare work too.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_actual_tokens: int
    max_query_len: int | None = None
    max_seq_len: int | None = None
    query_start_loc_cpu: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """A step, checked and divided for layers of one geometry. Backends derive from it.

    It holds for the tensors' contents at the time it was made and must not outlive the step.
    """

    step: Step
    geometry: PlanGeometry


@dataclass(frozen=True)
class Limits:
    """What no step of an engine exceeds: sequences, and tokens of one."""

    max_num_seqs: int
    max_seq_len: int
    device: torch.device


class PreparedLayer(Protocol):
    """One layer with everything packed as its kernels read it. Immutable.

    kv_cache is `[num_blocks, num_kv_heads, block_size, key_width + value_width]` of the spec's
    cache_dtype (or uint8 in its place, for fp8); block_size is a multiple of 16, every head's part
    of a block (the last two dimensions) is contiguous, and its inside belongs to the
    implementation: only blocks written by the same kernels may be read. Memory never written may
    hold anything, NaN included, and never reaches an output. A NaN in a query, or in a key or value
    that a query attends to, gives NaN in that query's output row; in a coded cache only where its
    token scale can hold it.
    """

    @property
    def spec(self) -> LayerSpec:
        """What was prepared."""
        ...

    def write_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store `key [num_tokens, num_kv_heads, rank_k]` and `value [.., rank_v]` in their slots.

        With a down-projection they are `[num_tokens, num_kv_heads, size]`, those that it has a
        basis for, and what it makes of them is stored.
        slot_mapping: int64 `[num_tokens]`, block * block_size + offset; negative slots are
        padding and skipped. It may be shorter than key (vLLM pads the batch).
        Raises KernelError for shapes and dtypes that do not fit.
        """
        ...

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor, plan: Plan
    ) -> None:
        """Causal attention of `query [num_tokens, num_heads, query_size]` into `output`.

        output: `[num_tokens, num_heads, rank_v]`, latent values, to be up-projected by the caller.
        query is already rotated where keys are reconstructed. Rows past query_start_loc[-1] stay as
        they are.
        Raises KernelError for shapes and dtypes that do not fit, and for another geometry's plan.
        """
        ...


class Kernels(Protocol):
    """One implementation; layers that it prepared and plans that it made go together.

    supports_graphs: a plan refers to the step's tensors and `attend` reads them on the device, so
        that a CUDA graph captured with it may be replayed after they changed, within its bounds.
    """

    name: str
    supports_graphs: bool

    def prepare(self, layer: LayerSpec) -> PreparedLayer:
        """Pack a layer's bases and rotary table. The tensors must not change afterwards.

        May wait for the device: not during the capture of a graph. Layers that share one
        `RotaryTable` object share its packed copy, which lives as long as this object.
        Raises KernelError for a layer that the kernels do not cover.
        """
        ...

    def plan(self, step: Step, geometry: PlanGeometry) -> Plan:
        """Check and divide one scheduler step for all layers of `geometry`.

        Raises KernelError where the step's tensors do not fit together.
        """
        ...

    def reserve(self, limits: Limits, layers: Sequence[PreparedLayer]) -> None:
        """Allocate what attending in these layers takes besides the cache; nothing is allocated
        by a step within the limits afterwards. A second call changes nothing."""
        ...

    def warm_up(self, limits: Limits, layers: Sequence[PreparedLayer], block_size: int) -> None:
        """Compile all that these layers run on caches with blocks of `block_size` tokens: no step
        compiles anything afterwards. Not during the capture of a graph."""
        ...
