# SPDX-License-Identifier: Apache-2.0
"""After the warm-up no step compiles a kernel, whatever its sequences, tokens and addresses are."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Any

import pytest

from tests.kernels.gpu.layers import BLOCK, LAYERS, LIMITS, Inputs, batches, inputs
from tests.kernels.gpu.specializations import recorded

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter specialises nothing"
)


def _serve(kernels: Any, layer: Any, given: Inputs) -> None:
    """Write and attend."""
    layer.write_cache(given.key, given.value, given.cache, given.slots)
    plan = kernels.plan(given.step, layer.spec.plan_geometry(BLOCK))
    layer.attend(given.query, given.cache, given.output, plan)


@pytest.mark.parametrize("name", LAYERS)
def test_no_step_compiles(name: str) -> None:
    from vllm_eigen.kernels.gpu.kernels import GpuKernels

    with recorded() as compiled:
        kernels = GpuKernels()
        layer = kernels.prepare(LAYERS[name])
        kernels.reserve(LIMITS, [layer])
        kernels.warm_up(LIMITS, [layer], BLOCK)
        names = sorted(kernel for kernel, _ in compiled)
        attention = f"{'coded' if 'codes' in name else 'paged'}_attention_kernel"
        assert names.count(attention) == 2  # Decode and prefill.
        assert len(names) == 4, names
        compiled.clear()
        for (lengths, queries), shift in itertools.product(batches(), (0, 1)):
            _serve(kernels, layer, inputs(layer.spec, lengths, queries, shift))
            assert compiled == [], (lengths, queries, shift)


def test_what_a_step_compiles_is_seen() -> None:
    """Without the warm-up, and where a layer is not what was warmed up."""
    from vllm_eigen.kernels.gpu.kernels import GpuKernels

    with recorded() as compiled:
        kernels = GpuKernels()
        layer = kernels.prepare(LAYERS["numbers"])
        _serve(kernels, layer, inputs(layer.spec, [3], [3]))
        assert len(compiled) == 2  # A prompt of three tokens is decoded, in one split.
        kernels.warm_up(LIMITS, [layer], BLOCK)
        compiled.clear()
        other = kernels.prepare(replace(LAYERS["numbers"], rank_v=16))
        _serve(kernels, other, inputs(other.spec, [3], [3]))
        assert compiled
