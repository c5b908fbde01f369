# SPDX-License-Identifier: Apache-2.0
"""The kernels that serve a model, and their plan of a scheduler step, made once for its layers.

`EIGEN_KERNELS` names the kernels, otherwise the fastest are taken that the machine has. Falling
back to the plain PyTorch reference is always said in the log.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vllm_eigen.common.errors import KernelError
from vllm_eigen.kernels import (
    Kernels,
    Latents,
    Limits,
    Plan,
    PlanGeometry,
    PreparedLayer,
    Step,
    load,
)
from vllm_eigen.plugin.vllm_api import CommonAttentionMetadata, init_logger

logger = init_logger("vllm_eigen")

KERNELS_VARIABLE = "EIGEN_KERNELS"


class StepPlanner:
    """Plans each step once for all layers of equal geometry. A model's layers share one planner.

    Args:
        limits: of every step, for which `reserve` allocates; None allocates and compiles nothing
            ahead.
        latents: of all layers of the model, those of other pipeline stages too.

    vLLM has one metadata builder for layers of equal ranks, and hands all of them the same
    `CommonAttentionMetadata` in a step, and another in the next.
    """

    def __init__(
        self, kernels: Kernels, limits: Limits | None = None, latents: tuple[Latents, ...] = ()
    ) -> None:
        self.kernels = kernels
        self.latents = latents
        self._limits = limits
        self._common: CommonAttentionMetadata | None = None
        self._plans: dict[PlanGeometry, Plan] = {}

    def reserve(self, layers: Sequence[PreparedLayer]) -> None:
        """Allocate the kernels' workspace for these layers; see `Kernels.reserve`."""
        if self._limits is not None:
            self.kernels.reserve(self._limits, layers)

    def warm_up(self, layers: Sequence[PreparedLayer], block_size: int) -> None:
        """Compile what these layers run; see `Kernels.warm_up`."""
        if self._limits is not None:
            self.kernels.warm_up(self._limits, layers, block_size)

    def plan(self, common: CommonAttentionMetadata, geometry: PlanGeometry) -> Plan:
        """The step's plan, the one made before if this step has one for the geometry."""
        if common is not self._common:
            self._common, self._plans = common, {}
        if geometry not in self._plans:
            self._plans[geometry] = self.plan_anew(common, geometry)
        return self._plans[geometry]

    def plan_anew(self, common: CommonAttentionMetadata, geometry: PlanGeometry) -> Plan:
        """A plan of what `common` says now; speculative decoding changes the object in place."""
        num_seqs = common.num_reqs
        step = Step(
            query_start_loc=common.query_start_loc[: num_seqs + 1],
            seq_lens=common.seq_lens[:num_seqs],
            block_table=common.block_table_tensor[:num_seqs],
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc_cpu=common.query_start_loc_cpu[: num_seqs + 1],
        )
        return self.kernels.plan(step, geometry)


def choose_kernels(device_type: str) -> Kernels:
    """The kernels for a device: those `EIGEN_KERNELS` names, else the fastest that load.

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
