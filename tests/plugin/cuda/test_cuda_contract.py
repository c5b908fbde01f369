# SPDX-License-Identifier: Apache-2.0
"""What the backend tells vLLM on an NVIDIA GPU, and what it refuses there, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from vllm_eigen.checkpoint.config import EigenConfig, LayerRanks
from vllm_eigen.common.errors import UsageError
from vllm_eigen.kernels import (
    LayerSpec,
    Limits,
    Plan,
    PlanGeometry,
    RotaryTable,
    ScoreOptions,
    Step,
)

ROOT = Path(__file__).parents[3]
SECONDS = 1100


class Kernels:
    """Kernels that compute nothing."""

    def __init__(self, name: str = "gpu") -> None:
        self.name = name
        self.supports_graphs = name == "gpu"
        self.reserved: list[Any] = []
        self.warmed_up: list[Any] = []

    def plan(self, step: Step, geometry: PlanGeometry) -> Plan:
        return Plan(step, geometry)

    def reserve(self, limits: Limits, layers: Any) -> None:
        self.reserved.append((limits, list(layers)))

    def warm_up(self, limits: Limits, layers: Any, block_size: int) -> None:
        self.warmed_up.append((limits, list(layers), block_size))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    ("kernels", "support", "mode"),
    [("gpu", "UNIFORM_BATCH", "FULL_AND_PIECEWISE"), ("reference", "NEVER", "PIECEWISE")],
)
def test_vllm_resolves_cuda_graphs(kernels: str, support: str, mode: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugin.cuda.faked_cuda"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "EIGEN_KERNELS": kernels},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert found["asked"] == "FULL_AND_PIECEWISE"
        assert (found["support"], found["mode"]) == (support, mode)
        assert found["layers"] > 1
        assert found["block_size"] == 64


@pytest.mark.parametrize(("default", "size"), [(16, 64), (32, 64), (64, 64), (96, 64), (128, 128)])
def test_block_size(default: int, size: int) -> None:
    from vllm_eigen.plugin.backend import EigenAttentionBackend

    assert EigenAttentionBackend.get_preferred_block_size(default) == size


def test_the_backend_has_a_name_of_its_own() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_eigen.plugin.backend import EigenAttentionBackend
    from vllm_eigen.plugin.register import register

    register()
    register()
    member = AttentionBackendEnum[EigenAttentionBackend.get_name()]
    assert member.name == "EIGEN"
    assert member.get_class() is EigenAttentionBackend
    assert not AttentionBackendEnum.CUSTOM.is_overridden()


def _builder(kernels: Kernels) -> Any:
    from vllm_eigen.plugin.backend import EigenMetadataBuilder
    from vllm_eigen.plugin.step_planner import StepPlanner

    builder: Any = EigenMetadataBuilder.__new__(EigenMetadataBuilder)
    builder._planner = StepPlanner(kernels)  # type: ignore[arg-type]
    builder._geometry = PlanGeometry(4, 2, 2, reconstructs_keys=False, block_size=64)
    return builder


@pytest.mark.parametrize("queries", [1, 4])
def test_a_capture_keeps_the_buffers_and_the_bounds(queries: int) -> None:
    common = SimpleNamespace(
        query_start_loc=torch.arange(5, dtype=torch.int32) * queries,
        query_start_loc_cpu=torch.arange(5, dtype=torch.int32) * queries,
        seq_lens=torch.full((4,), 131_072, dtype=torch.int32),
        block_table_tensor=torch.zeros(4, 3, dtype=torch.int32),
        num_reqs=4,
        num_actual_tokens=4 * queries,
        max_query_len=queries,
        max_seq_len=131_072,
    )
    builder = _builder(Kernels())
    step = builder.build_for_cudagraph_capture(common).plan.step
    assert step.max_seq_len == 131_072
    assert step.seq_lens.tolist() == [queries] * 4
    for ours, theirs in (
        (step.query_start_loc, common.query_start_loc),
        (step.seq_lens, common.seq_lens),
        (step.block_table, common.block_table_tensor),
    ):
        assert ours.data_ptr() == theirs.data_ptr()


def test_the_workspace_is_allocated_in_vllms_profiling_run() -> None:
    from vllm_eigen.plugin.backend import EigenAttentionImpl
    from vllm_eigen.plugin.step_planner import StepPlanner

    kernels, limits = Kernels(), Limits(256, 8192, torch.device("cpu"))
    impl: Any = EigenAttentionImpl.__new__(EigenAttentionImpl)
    impl.planner, impl._prepared = StepPlanner(kernels, limits), object()  # type: ignore[arg-type]
    output = torch.full((3, 4, 8), torch.nan)
    rows = torch.zeros(3, 4, 8)
    impl.forward(None, rows, rows, rows, torch.zeros(0), None, output)
    assert kernels.reserved == [(limits, [impl._prepared])]
    assert not output.any()


def test_a_builder_compiles_what_its_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes builders after the weights are loaded and before it captures graphs."""
    from vllm_eigen.plugin import backend
    from vllm_eigen.plugin.step_planner import StepPlanner

    kernels, limits = Kernels(), Limits(256, 8192, torch.device("cpu"))
    planner = StepPlanner(kernels, limits)  # type: ignore[arg-type]
    specs = [LayerSpec(4, 2, r, 8, torch.float32, torch.float32, ScoreOptions(1.0)) for r in (8, 9)]
    impls = [SimpleNamespace(prepared=SimpleNamespace(spec=s), planner=planner) for s in specs]
    layers = [SimpleNamespace(impl=impl) for impl in impls]
    monkeypatch.setattr(backend, "attention_layers", lambda *_: layers)
    spec: Any = SimpleNamespace(block_size=64)
    config: Any = SimpleNamespace()
    backend.EigenMetadataBuilder(spec, ["a", "b"], config, torch.device("cpu"))
    prepared = [impl.prepared for impl in impls]
    assert kernels.reserved == [(limits, prepared)]
    assert kernels.warmed_up == [(limits, prepared, 64)]


def _check(
    kernels: str = "gpu",
    *,
    cache_dtype: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    block_size: int | None = None,
    rank: int = 64,
    context_parallel: int = 1,
) -> None:
    from vllm_eigen.plugin.validation import check_attention

    layers = (LayerRanks(rank_k=8, rank_v=8), LayerRanks(rank_k=8, rank_v=rank))
    eigen = EigenConfig.model_construct(layers=layers)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype),
        cache_config=SimpleNamespace(
            cache_dtype=cache_dtype,
            block_size=block_size,
            user_specified_block_size=block_size is not None,
        ),
        parallel_config=SimpleNamespace(
            prefill_context_parallel_size=1, decode_context_parallel_size=context_parallel
        ),
        kv_transfer_config=None,
    )
    check_attention(eigen, config, Kernels(kernels))  # type: ignore[arg-type]


def test_cache_types_without_a_meaning_are_refused() -> None:
    from vllm.config.cache import CacheDType

    from vllm_eigen.plugin.backend import EigenAttentionBackend

    known = EigenAttentionBackend.supported_kv_cache_dtypes
    names = set(get_args(CacheDType))
    assert {"nvfp4", "int4_per_token_head", "turboquant_4bit_nc", "fp8_inc"} <= names - set(known)
    for name in names - set(known):
        with pytest.raises(UsageError, match=f"--kv-cache-dtype {name} is not a type of Eigen"):
            _check("reference", cache_dtype=name)
    for name in set(known) - {"float16"}:
        _check(cache_dtype=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "float16"}, "--kv-cache-dtype float16 differs from --dtype bfloat16"),
        ({"dtype": torch.float64}, "--dtype float64 is not supported; choose bfloat16"),
        ({"block_size": 24}, "--block-size 24 does not fit .* a multiple of 16"),
        ({"rank": 257}, "rank 257 is beyond the GPU kernels' 256; calibrate"),
        ({"context_parallel": 2}, "cannot serve this configuration: DCP not supported"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        _check(**options)
    assert "\n" not in str(refused.value)


def test_served() -> None:
    _check(block_size=48)
    _check("reference", rank=1000)
    _check(rank=256, dtype=torch.float16, cache_dtype="float16")


@pytest.mark.parametrize(
    ("capability", "cache_dtype", "message"),
    [
        ((7, 5), "auto", "need compute capability 8.0, this GPU has 7.5"),
        ((8, 6), "fp8", "--kv-cache-dtype fp8 needs compute capability 8.9, this GPU has 8.6"),
        ((8, 0), "fp8_e4m3", "choose fp8_e5m2 or auto"),
        ((8, 0), "fp8_e5m2", None),
        ((8, 9), "fp8", None),
        ((10, 0), "fp8_e4m3", None),
    ],
)
def test_compute_capability(
    capability: tuple[int, int],
    cache_dtype: str,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_eigen.plugin import validation

    monkeypatch.setattr(validation, "device_capability", lambda: capability)
    _check("reference", cache_dtype=cache_dtype)
    if message is None:
        _check(cache_dtype=cache_dtype)
        return
    with pytest.raises(UsageError, match=message):
        _check(cache_dtype=cache_dtype)


def test_a_context_beyond_the_rope_table_is_refused() -> None:
    from vllm_eigen.plugin.validation import check_positions

    table = RotaryTable.from_frequencies(torch.ones(4), 512)
    check_positions(table, 512)
    with pytest.raises(UsageError, match=r"--max-model-len 513 .* RoPE table of 512 positions"):
        check_positions(table, 513)
