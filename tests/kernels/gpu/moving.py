# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Triton kernels share: where they run, and the kernels fed from the CPU."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.kernels.cases import Case, attending, expected, make, run, tolerance
from vllm_eigen.kernels import Latents, LayerSpec, Plan, PlanGeometry, PreparedLayer, Step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
RUNS_HERE = HAS_GPU or INTERPRETED
SETTINGS = settings(
    deadline=None,
    max_examples=200 if HAS_GPU else 12,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
needs_kernels = pytest.mark.skipif(
    not RUNS_HERE, reason="no GPU: test_without_a_gpu runs it interpreted, in its own process"
)

if INTERPRETED:
    from tests.kernels.gpu.interpreter.repairs import repair_interpreter

    repair_interpreter()

if RUNS_HERE:
    from vllm_eigen.kernels.gpu.kernels import GpuKernels
    from vllm_eigen.kernels.gpu.tiles import Tile, Tuning

    TUNINGS = (
        Tuning(),
        Tuning(decode_split=64),
        Tuning(
            decode=Tile(16, 32, 1, 3, swap_ab=False),
            decode_reconstruct=Tile(16, 32, 4, 3, swap_ab=False),
            decode_coded=Tile(16, 32, 4, 3, swap_ab=False),
            decode_coded_reconstruct=Tile(16, 32, 4, 3, swap_ab=False),
            prefill=Tile(32, 32, 4, 3, swap_ab=False),
            decode_split=32,
            share_latents=False,
        ),
        Tuning(relative_rotation=False, decode_split=128, max_decode=1),
    )


def run_interpreted(file: str) -> None:
    """The tests of a file in a process of its own, with Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    result = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert result.returncode == 0, result.stdout[-6000:]


class Moving:
    """The kernels, fed from the CPU: moves every argument to the GPU where there is one."""

    name = "gpu"

    def __init__(
        self,
        index: int = 0,
        hints: bool = False,
        peers: tuple[Latents, ...] = (),
        shared_bytes: int | None = None,
    ) -> None:
        """shared_bytes: of another device, where not this one's."""
        self.inner = GpuKernels(TUNINGS[index])
        if shared_bytes is not None:
            self.inner._shared_bytes = shared_bytes
        # Partial results that nobody wrote are NaN.
        device = "cuda" if HAS_GPU else "cpu"
        self.inner.workspace._buffer = torch.full((1 << 20,), torch.nan, device=device)
        self.hints = hints
        self.peers = peers

    def prepare(self, layer: LayerSpec) -> MovingLayer:
        layer = dataclasses.replace(layer, peers=self.peers)
        return MovingLayer(layer, self.inner.prepare(move(layer)))

    def plan(self, step: Step, geometry: PlanGeometry) -> Plan:
        if self.hints:
            lengths = step.query_start_loc[1:] - step.query_start_loc[:-1]
            bounds = int(lengths.max()), int(step.seq_lens.max())
            step = dataclasses.replace(step, max_query_len=bounds[0], max_seq_len=bounds[1])
        starts = step.query_start_loc if self.hints else None
        step = dataclasses.replace(move(step), query_start_loc_cpu=starts)
        return self.inner.plan(step, geometry)


@dataclasses.dataclass(frozen=True)
class MovingLayer:
    spec: LayerSpec
    inner: PreparedLayer

    def write_cache(self, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
        moved = move(kv_cache)
        self.inner.write_cache(move(key), move(value), moved, move(slots))
        if HAS_GPU:
            kv_cache.copy_(moved)

    def attend(self, query: Any, kv_cache: Any, output: Any, plan: Plan) -> None:
        moved = move(output)
        self.inner.attend(move(query), move(kv_cache), moved, plan)
        if HAS_GPU:
            output.copy_(moved)


def move(value: Any) -> Any:
    """A tensor, or a dataclass of them, where the kernels run."""
    if not HAS_GPU:
        return value
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: move(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def small(case: Case) -> Case:
    """The case, short enough for the interpreter."""
    if HAS_GPU:
        return case
    sequences = tuple((old % 190, (new - 1) % 40 + 1) for old, new in case.sequences[:3])
    return dataclasses.replace(case, sequences=sequences)


def close(case: Case, kernels: Moving) -> torch.Tensor:
    problem = make(case)
    found = run(kernels, problem, free_outside_window=True)
    np.testing.assert_allclose(found.double().numpy(), expected(problem), atol=tolerance(case))
    return found


def alone_as_in_company(case: Case) -> None:
    """The first sequence gets the same bits alone, in the case, and with bounds from the host."""
    problem = make(case)
    count = case.sequences[0][1]
    together = run(Moving(1), problem)
    assert torch.equal(together, run(Moving(1, hints=True), problem))
    alone = dataclasses.replace(
        problem,
        query=torch.cat([problem.query[:count], problem.query[-1:]]),
        keys=problem.keys[:1],
        values=problem.values[:1],
        query_start_loc=problem.query_start_loc[:2],
        seq_lens=problem.seq_lens[:1],
        block_table=problem.block_table[:1],
    )
    assert torch.equal(together[:count], run(Moving(1, hints=True), alone))


def with_nan(case: Case, place: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs with a NaN in head 1 of the query, key or value, and without it.

    Args:
        case: a sequence that decodes, and one with a prompt of more than twelve tokens.

    Returns:
        poisoned, clean: [tokens, num_heads, size]; reached: where the NaN may be seen, bool
        [tokens, num_heads].
    """
    problem = make(case)
    clean = run(Moving(1), problem)
    reached = torch.zeros(clean.shape[:2], dtype=torch.bool)
    for sequence, token in ((0, case.sequences[0][0] - 4), (1, 11)):
        if place == "query":
            start = int(problem.query_start_loc[sequence])
            problem.query[start, 1, 3] = torch.nan
            reached[start, 1] = True
        else:
            rows = (problem.keys if place == "key" else problem.values)[sequence]
            rows[token, 1, 3] = torch.nan
            reached |= attending(problem, sequence, 1, token)
    return run(Moving(1), problem), clean, reached
