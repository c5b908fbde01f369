# SPDX-License-Identifier: Apache-2.0
"""What a step does in every kind of layer, from vLLM's call down to the launches, without a GPU.

Triton's launcher runs, and only the launch itself stands still; see `recorded`.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.gpu.forbids import Forbids
from tests.kernels.gpu.layers import BLOCK, LAYERS, LIMITS, Inputs, batches, inputs
from tests.kernels.gpu.specializations import recorded

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter computes with tensors"
)


def _builder(impl: Any) -> Any:
    from vllm_eigen.plugin.backend import EigenMetadataBuilder

    builder: Any = EigenMetadataBuilder.__new__(EigenMetadataBuilder)
    builder._planner = impl.planner
    builder._geometry = impl.prepared.spec.plan_geometry(BLOCK)
    return builder


def _common(given: Inputs) -> Any:
    """The step as vLLM describes it."""
    step = given.step
    return SimpleNamespace(
        query_start_loc=step.query_start_loc,
        query_start_loc_cpu=step.query_start_loc_cpu,
        seq_lens=step.seq_lens,
        block_table_tensor=step.block_table,
        num_reqs=step.seq_lens.shape[0],
        num_actual_tokens=step.num_actual_tokens,
        max_query_len=step.max_query_len,
        max_seq_len=step.max_seq_len,
    )


def _in_a_wider_row(cache: torch.Tensor) -> torch.Tensor:
    """The cache of a layer whose pages have room for wider rows."""
    wider = torch.zeros(*cache.shape[:3], cache.shape[3] + 8, dtype=cache.dtype)
    return wider[:, : cache.shape[1]]


@pytest.mark.parametrize("name", LAYERS)
def test_no_step_allocates_or_waits(name: str) -> None:
    """Metadata, cache write and attention take views; only the profiling run allocates."""
    from vllm_eigen.kernels.gpu.kernels import GpuKernels
    from vllm_eigen.plugin.backend import EigenAttentionImpl
    from vllm_eigen.plugin.step_planner import StepPlanner

    spec = LAYERS[name]
    with recorded() as launched:
        kernels = GpuKernels()
        planner = StepPlanner(kernels, LIMITS)
        impl = EigenAttentionImpl(spec.num_heads, spec.rank_k, 0.1, planner=planner)
        impl.prepare(spec)
        rows = torch.zeros(1, spec.num_heads, spec.rank_v)
        impl.forward(None, rows, rows, rows, torch.zeros(0), None, rows)
        buffer = kernels.workspace._buffer
        assert buffer is not None
        assert kernels.workspace.num_bytes > 0
        builder = _builder(impl)
        for lengths, queries in batches():
            given = inputs(spec, lengths, queries)
            common = _common(given)
            for cache in (given.cache, _in_a_wider_row(given.cache)):
                with Forbids():
                    metadata = builder.build(0, common)
                    impl.do_kv_cache_update(None, given.key, given.value, cache, given.slots)
                    impl.forward(
                        *(None, given.query, given.key, given.value, cache, metadata, given.output)
                    )
        assert kernels.workspace._buffer is buffer
        assert len(launched) == 4  # Cache write, decode, prefill, and the combination of splits.
