# SPDX-License-Identifier: Apache-2.0
"""Pages of mixed models in vLLM's own planner: groups, blocks and capacity are those foretold.

So is what `vllm-eigen estimate` says, of the model and of its base.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eigen.checkpoint.config import FORMAT_VERSION, EigenConfig, LayerRanks
from vllm_eigen.checkpoint.estimate import estimate
from vllm_eigen.checkpoint.modes import KeyMode, Projections

HEAD, WINDOW = 64, 512
MODEL: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "head_dim": HEAD,
    "intermediate_size": 64,
    "vocab_size": 100,
    "dtype": "bfloat16",
    "sliding_window": WINDOW,
}


def configuration(max_model_len: int, in_flight: int, block_size: int) -> Any:
    """What the planner reads of vLLM's configuration."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(
            block_size=block_size,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
            get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC,
        ),
        model_config=SimpleNamespace(
            max_model_len=max_model_len,
            original_max_model_len=max_model_len,
            hf_text_config=SimpleNamespace(sliding_window=WINDOW),
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, tensor_parallel_size=1, pipeline_parallel_size=1
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        max_in_flight_tokens=in_flight,
        num_prefill_lookahead_tokens=0,
    )


@pytest.mark.feature("layers with sliding windows beside compressed ones: vLLM's own capacity")
@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.tuples(st.integers(1, HEAD), st.integers(1, HEAD)), min_size=1, max_size=5),
    kept=st.integers(1, 20),
    heads=st.integers(1, 4),
    max_model_len=st.integers(64, 20000),
    in_flight=st.sampled_from([48, 2048]),
    block_size=st.sampled_from([16, 32, 64, 128]),
)
def test_capacity_is_vllm_s(
    ranks: list[tuple[int, int]],
    kept: int,
    heads: int,
    max_model_len: int,
    in_flight: int,
    block_size: int,
) -> None:
    from vllm.v1.core.kv_cache_utils import (
        get_kv_cache_configs,
        get_max_concurrency_for_kv_cache_config,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from vllm_eigen.plugin.attention import Beside, EigenAttention
    from vllm_eigen.plugin.vllm_api import mixed_cache

    config = configuration(max_model_len, in_flight, block_size)
    layers = tuple(LayerRanks(rank_k=key, rank_v=value) for key, value in ranks)
    common: dict[str, Any] = {"num_kv_heads": heads, "dtype": torch.bfloat16}
    specs: dict[str, Any] = {
        f"kept.{index}": SlidingWindowSpec(
            block_size=block_size, head_size=HEAD, sliding_window=WINDOW, **common
        )
        for index in range(kept)
    }
    for index, layer in enumerate(layers):
        attention: Any = SimpleNamespace(
            kv_cache_torch_dtype=torch.bfloat16, full_elements=2 * HEAD * heads, num_kv_heads=heads
        )
        own = FullAttentionSpec(
            block_size=block_size, head_size=layer.rank_k, head_size_v=layer.rank_v, **common
        )
        specs[f"compressed.{index}"] = EigenAttention._beside_kept(
            attention, own, Beside(kept, layers), config
        )
    mixed = mixed_cache(
        config, compressed_layers=len(layers), kept_layers=kept, kept_bytes=4 * HEAD * heads
    )
    assert mixed is not None
    largest = max(layer.num_bytes(2) for layer in layers)
    pages = mixed.pages(block_size, heads * largest)
    memory = 5 * pages.sequence_bytes + pages.block_bytes + 17
    (planned,) = get_kv_cache_configs(config, [dict(specs)], [memory])
    assert planned.num_blocks == memory // pages.block_bytes
    found = get_max_concurrency_for_kv_cache_config(config, planned)
    assert found == planned.num_blocks / pages.sequence_blocks
    kept_layers = tuple(range(kept))
    model = {
        **MODEL,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": kept + len(layers),
        "layer_types": ["sliding_attention"] * kept + ["full_attention"] * len(layers),
    }
    eigen = EigenConfig(
        format_version=FORMAT_VERSION,
        key_mode=KeyMode.PRE_ROPE,
        projections=Projections.VALUES_FOLDED,
        method="made up",
        num_heads=heads,
        num_kv_heads=heads,
        head_size=HEAD,
        layers=layers,
        kept_layers=kept_layers,
        provenance={},
    )
    options: dict[str, Any] = {
        "max_model_len": max_model_len,
        "in_flight": in_flight,
        "block_size": block_size,
        "stored_bytes": 0,  # the whole memory is the pool
    }
    compressed = {**model, "eigen": eigen.model_dump(mode="json")}
    assert estimate(compressed, memory, **options).compressed.sequences == found
    full = FullAttentionSpec(block_size=block_size, head_size=HEAD, **common)
    base = {name: full if name.startswith("compressed") else specs[name] for name in specs}
    (planned_base,) = get_kv_cache_configs(config, [base], [memory])
    of_base = get_max_concurrency_for_kv_cache_config(config, planned_base)
    assert estimate(model, memory, **options).uncompressed.sequences == of_base
    together = {name for group in planned.kv_cache_groups for name in group.layer_names}
    assert together == set(specs)
    for group in planned.kv_cache_groups:
        size = group.kv_cache_spec.block_size
        full = any(name.startswith("compressed") for name in group.layer_names)
        assert size == (pages.block_size if full else pages.kept_block_size)
