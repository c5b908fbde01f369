"""The attention back end vLLM calls for Eigen layers: metadata in, kernels out.

Which kernels run is decided once per layer: `VLLM_EIGEN_KERNELS` names them, else the fastest the
machine has. Falling back to the plain PyTorch reference is always said in the log.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_eigen.errors import KernelError, UsageError
from vllm_eigen.kernels import Kernels, ScoreOptions, load
from vllm_eigen.vllm_internals import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    KVCacheLayout,
    MultipleOf,
    init_logger,
)

logger = init_logger("vllm_eigen")

KERNELS_VARIABLE = "VLLM_EIGEN_KERNELS"
BLOCK_MULTIPLE = 16


@dataclass(frozen=True)
class EigenMetadata:
    """One scheduler step, the same for every layer.

    Attributes:
        num_actual_tokens: tokens of the step without padding.
        query_start_loc: [num_seqs + 1] int32, where each sequence's queries begin.
        seq_lens: [num_seqs] int32, cached tokens of each sequence, this step's included.
        block_table: [num_seqs, max_blocks] int32.
        max_query_len, max_seq_len: upper bounds, in tokens.
    """

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    max_seq_len: int


class EigenMetadataBuilder(AttentionMetadataBuilder[EigenMetadata]):
    """Picks the fields the kernels read; vLLM runs one builder per layer, so it copies nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> EigenMetadata:
        """Metadata of one step."""
        common = common_attn_metadata
        num_seqs = common.num_reqs
        return EigenMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc[: num_seqs + 1],
            seq_lens=common.seq_lens[:num_seqs],
            block_table=common.block_table_tensor[:num_seqs],
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
        )


class EigenAttentionImpl(AttentionImpl[EigenMetadata]):
    """One layer's attention over its pages of latents."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER or kv_sharing_target_layer_name is not None:
            raise UsageError("Eigen attention serves decoder self-attention with its own cache")
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_kv_heads or num_heads
        self.scale = scale
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        slopes = torch.tensor(alibi_slopes, dtype=torch.float32) if alibi_slopes else None
        self.score = ScoreOptions(scale, slopes, sliding_window, logits_soft_cap or None)
        self.kernels = choose_kernels(torch.get_default_device().type)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write key [num_tokens, num_kv_heads, rank_k] and value [.., rank_v] to the pages, or
        what the layer's `encode` makes of wider ones."""
        num_tokens = slot_mapping.shape[0]
        self.kernels.write_cache(
            key[:num_tokens],
            value[:num_tokens],
            self._typed(kv_cache),
            slot_mapping,
            layer._k_scale_float,
            layer._v_scale_float,
            layer.encode,
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: EigenMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend: query [num_tokens, num_heads, query_size] -> output [.., num_heads, rank_v].

        Key and value are in the cache already. Without metadata (warm-up) nothing is computed.
        """
        if attn_metadata is None:
            return output
        num_tokens = attn_metadata.num_actual_tokens
        self.kernels.attend(
            query[:num_tokens],
            self._typed(kv_cache),
            output[:num_tokens],
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.score,
            layer.rebuild,
            layer._k_scale_float,
            layer._v_scale_float,
            max_query_len=attn_metadata.max_query_len,
            max_seq_len=attn_metadata.max_seq_len,
        )
        return output

    def _typed(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """vLLM hands fp8 caches over as bytes; give them their element type."""
        if kv_cache.dtype != torch.uint8:
            return kv_cache
        e5m2 = self.kv_cache_dtype == "fp8_e5m2"
        return kv_cache.view(torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn)


class EigenAttentionBackend(AttentionBackend):
    """What vLLM asks about the back end before it runs."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
        "fp8_e5m2",
    ]

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's table of back ends; third parties share `CUSTOM`."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[EigenAttentionImpl]:
        """The class that computes."""
        return EigenAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EigenMetadataBuilder]:
        """The class that prepares a step."""
        return EigenMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        """Block sizes in tokens."""
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major pages: every head's part of a block is one contiguous run."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """All kernels mask by distance."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Sequences are computed alone, in chunks whose bounds do not depend on the batch."""
        return True


def choose_kernels(device_type: str) -> Kernels:
    """The kernels for a device: those `VLLM_EIGEN_KERNELS` names, else the fastest that load.

    Raises:
        KernelError: the named kernels are unknown or cannot be loaded.
    """
    named = os.environ.get(KERNELS_VARIABLE)
    if named:
        return load(named)
    preferred = {"cpu": "cpu", "cuda": "gpu"}.get(device_type)
    if preferred is None:
        logger.warning_once("no fast Eigen kernels for %s: using plain PyTorch", device_type)
        return load("reference")
    try:
        return load(preferred)
    except KernelError as error:
        logger.warning_once("Eigen attention falls back to plain PyTorch, slower: %s", error)
        return load("reference")
