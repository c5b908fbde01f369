# SPDX-License-Identifier: Apache-2.0
"""Python and C++ agree on constants; plans and layers that do not go together are refused."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import Case, layer_of, make, run, step_of
from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels import load
from vllm_eigen.kernels.cpu import abi
from vllm_eigen.kernels.cpu.bindings import Library
from vllm_eigen.kernels.cpu.kernels import CpuKernels


def test_a_library_with_other_constants_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = CpuKernels()
    monkeypatch.setitem(abi.SHARED, "kv chunk", 128)
    with pytest.raises(KernelError, match="has kv chunk = 256, Python has 128"):
        Library(kernels.isa)


def test_plans_serve_layers_of_other_ranks_but_not_of_another_geometry() -> None:
    kernels = CpuKernels()
    problem = make(Case())
    step = step_of(problem)
    wide = kernels.prepare(layer_of(make(Case(rank_k=12, rank_v=20))))
    plan = kernels.plan(step, layer_of(problem).plan_geometry(16))
    output = torch.full((6, 2, 20), float("nan"))
    cache = torch.zeros(3, 2, 16, 32)
    wide.attend(torch.zeros(6, 2, 12), cache, output, plan)
    assert not output[:5].any()
    other = kernels.prepare(layer_of(make(Case(queries_per_head=2))))
    with pytest.raises(KernelError, match="another geometry"):
        other.attend(torch.zeros(6, 4, 8), cache[..., :16].contiguous(), torch.zeros(6, 4, 8), plan)
    reference = load("reference").plan(step, plan.geometry)
    with pytest.raises(KernelError, match="other kernels"):
        wide.attend(torch.zeros(6, 2, 12), cache, output, reference)


def test_queries_that_a_plan_does_not_fit_are_refused() -> None:
    kernels = CpuKernels()
    problem = make(Case())
    layer = kernels.prepare(layer_of(problem))
    plan = kernels.plan(step_of(problem), layer.spec.plan_geometry(16))
    with pytest.raises(KernelError, match="outside the query"):
        layer.attend(torch.zeros(4, 2, 8), torch.zeros(3, 2, 16, 16), torch.zeros(4, 2, 8), plan)


def test_layers_share_the_packed_table_of_one_rotary_table() -> None:
    kernels = CpuKernels()
    problem = make(Case(reconstruct=True))
    first, second = (kernels.prepare(layer_of(problem)).packed for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.table is second.table
    assert run(kernels, problem).isfinite().all()
