# SPDX-License-Identifier: Apache-2.0
"""Eigen attention as a vLLM attention backend: the metadata of a step, and what runs the layers.

`EigenAttentionImpl` holds a layer's prepared kernels. Each step `EigenMetadataBuilder` takes the
step's plan from the model's `StepPlanner`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_eigen.common.errors import EngineError, UsageError
from vllm_eigen.kernels import (
    LayerSpec,
    Plan,
    PreparedLayer,
    ScoreOptions,
)
from vllm_eigen.plugin.register import BACKEND_NAME
from vllm_eigen.plugin.step_planner import StepPlanner
from vllm_eigen.plugin.vllm_api import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    KVCacheLayout,
    KVCacheSpec,
    MultipleOf,
    VllmConfig,
    attention_layers,
)

BLOCK_MULTIPLE = 16
GPU_BLOCK_SIZE = 64
"""Tokens that the Triton kernels load at once; with smaller blocks a load touches several."""


@dataclass(frozen=True)
class EigenMetadata:
    """One scheduler step, for all layers of a builder."""

    plan: Plan


class EigenMetadataBuilder(AttentionMetadataBuilder[EigenMetadata]):
    """Gives the layers of one attention group (equal pages and heads) the plan of a step.

    Its metadata refers to vLLM's persistent buffers. Where the kernels read them on the device, a
    captured graph is replayed for any step of its shape: one query a sequence, or equally many.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """None for kernels whose plans hold what the step's tensors say."""
        layers = vllm_config.compilation_config.static_forward_context.values()
        impls = [getattr(layer, "impl", None) for layer in layers]
        ours = [impl for impl in impls if isinstance(impl, EigenAttentionImpl)]
        if all(impl.planner.kernels.supports_graphs for impl in ours):
            return cls._cudagraph_support
        return AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        impls = [layer.impl for layer in attention_layers(vllm_config, layer_names)]
        block_size = int(kv_cache_spec.block_size)
        geometries = {impl.prepared.spec.plan_geometry(block_size) for impl in impls}
        if len(geometries) != 1:
            raise EngineError(
                f"the layers {', '.join(layer_names)} share their metadata and differ in key mode; "
                "serve target and draft model of one key mode"
            )
        (self._geometry,) = geometries
        self._planner: StepPlanner = impls[0].planner
        self.supports_draft_decode_metadata_update = self._planner.kernels.supports_graphs
        layers = [impl.prepared for impl in impls]
        self._planner.reserve(layers)
        # vLLM makes builders once the weights are loaded and the block size is known, and before it
        # captures graphs: the first place where all that is compiled is known.
        self._planner.warm_up(layers, block_size)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> EigenMetadata:
        """Metadata of one step. `fast_build` is vLLM's for drafting, in which it builds many times
        from one object that it changes between."""
        plan = self._planner.plan_anew if fast_build else self._planner.plan
        return EigenMetadata(plan(common_attn_metadata, self._geometry))

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> EigenMetadata:
        """Metadata whose bounds hold for every replay, of the shortest sequences there can be.

        vLLM hands over sequences of full length, over which a capture would take long.
        """
        metadata = self.build(0, common_attn_metadata)
        common_attn_metadata.seq_lens.fill_(common_attn_metadata.max_query_len)
        return metadata

    def update_draft_decode_metadata(self, metadata: EigenMetadata) -> None:
        """Nothing to do: the kernels read vLLM's persistent buffers, within the same bounds."""


class EigenAttentionImpl(AttentionImpl[EigenMetadata]):
    """Attention of one layer over its cache of latents."""

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
        *,
        planner: StepPlanner,
    ) -> None:
        if attn_type != AttentionType.DECODER or kv_sharing_target_layer_name is not None:
            raise UsageError("Eigen attention serves decoder self-attention with its own cache")
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_kv_heads or num_heads
        self.scale = scale
        slopes = torch.tensor(alibi_slopes, dtype=torch.float32) if alibi_slopes else None
        self.scores = ScoreOptions(scale, slopes, sliding_window, logits_soft_cap or None)
        self.planner = planner
        self._prepared: PreparedLayer | None = None

    def prepare(self, layer: LayerSpec) -> None:
        """Pack what the kernels need of the layer; again when its weights are loaded again."""
        self._prepared = self.planner.kernels.prepare(layer)

    @property
    def prepared(self) -> PreparedLayer:
        """The layer as the kernels read it."""
        if self._prepared is None:
            raise EngineError("an attention layer runs before its weights are loaded")
        return self._prepared

    def reserve_workspace(self) -> None:
        """Allocate what the layer takes beside its cache, with the room that other layers share.

        vLLM 0.33 has a call of this name in its profiling run, for MLA layers alone.
        """
        self.planner.reserve([self.prepared])

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write key [num_tokens, num_kv_heads, rank_k] and value [.., rank_v] to their blocks, or
        what the layer's down-projection makes of wider ones."""
        num_tokens = slot_mapping.shape[0]
        cache = self._rows(kv_cache)
        self.prepared.write_cache(key[:num_tokens], value[:num_tokens], cache, slot_mapping)

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

        Key and value are in the cache already. Without metadata (vLLM measures what memory a step
        takes) the kernels' workspace is allocated, so that it counts, and the output is zero.
        """
        if attn_metadata is None:
            self.reserve_workspace()
            return output.zero_()
        plan = attn_metadata.plan
        num_tokens = plan.step.num_actual_tokens
        cache = self._rows(kv_cache)
        self.prepared.attend(query[:num_tokens], cache, output[:num_tokens], plan)
        return output

    def _rows(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The cache with rows of the layer's own width; the largest layer's may be wider. A head's
        part of a block is contiguous, so that its rows may begin anywhere."""
        spec = self.prepared.spec
        width = spec.key_width + spec.value_width
        if kv_cache.shape[3] == width:
            return kv_cache
        shape, stride = kv_cache.shape, kv_cache.stride()
        return kv_cache.as_strided((*shape[:3], width), (*stride[:2], width, 1))


class EigenAttentionBackend(AttentionBackend):
    """What vLLM asks about the backend before it runs."""

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
        """What `register` enters into vLLM's table of backends."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[EigenAttentionImpl]:
        """The class that computes."""
        return EigenAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EigenMetadataBuilder]:
        """The class that builds a step's metadata."""
        return EigenMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        """Block sizes in tokens."""
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Block size in tokens where the user names none."""
        is_fit = default_block_size % GPU_BLOCK_SIZE == 0
        return default_block_size if is_fit else GPU_BLOCK_SIZE

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major blocks: every head's part of a block is contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """All kernels mask by distance."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Sequences are computed alone, in KV chunks whose bounds do not depend on the batch."""
        return True
