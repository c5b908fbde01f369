# SPDX-License-Identifier: Apache-2.0
"""A step is planned once a geometry, and again where vLLM changes its metadata in place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vllm_eigen.kernels import Plan, PlanGeometry, Step

GEOMETRY = PlanGeometry(4, 2, 2, reconstructs_keys=False, block_size=16)
OTHER = PlanGeometry(4, 2, 4, reconstructs_keys=True, block_size=16)


class Kernels:
    def plan(self, step: Step, geometry: PlanGeometry) -> Plan:
        return Plan(step, geometry)


def _common(num_reqs: int = 2) -> Any:
    """What the planner reads of vLLM's `CommonAttentionMetadata`, padded by one sequence."""
    return SimpleNamespace(
        query_start_loc=torch.arange(num_reqs + 2, dtype=torch.int32),
        query_start_loc_cpu=torch.arange(num_reqs + 2, dtype=torch.int32),
        seq_lens=torch.ones(num_reqs + 1, dtype=torch.int32),
        block_table_tensor=torch.zeros(num_reqs + 1, 3, dtype=torch.int32),
        num_reqs=num_reqs,
        num_actual_tokens=num_reqs,
        max_query_len=1,
        max_seq_len=7,
    )


def test_layers_of_equal_geometry_share_a_plan() -> None:
    from vllm_eigen.plugin.step_planner import StepPlanner

    planner, common = StepPlanner(Kernels()), _common()
    plan = planner.plan(common, GEOMETRY)
    assert planner.plan(common, GEOMETRY) is plan
    assert planner.plan(common, OTHER) is not plan
    assert planner.plan(common, GEOMETRY) is plan
    assert (plan.step.query_start_loc.shape, plan.step.block_table.shape) == ((3,), (2, 3))
    assert plan.step.query_start_loc_cpu.tolist() == [0, 1, 2]
    assert (plan.step.num_actual_tokens, plan.step.max_seq_len) == (2, 7)
    assert planner.plan(_common(), GEOMETRY) is not plan


def test_drafting_is_planned_anew() -> None:
    from vllm_eigen.plugin.step_planner import StepPlanner

    planner, common = StepPlanner(Kernels()), _common()
    planner.plan(common, GEOMETRY)
    common.max_seq_len = 8
    assert planner.plan_anew(common, GEOMETRY).step.max_seq_len == 8
