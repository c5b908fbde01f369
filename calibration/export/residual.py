# SPDX-License-Identifier: Apache-2.0
"""Whether a layer adds its attention's output to the hidden state as it is.

The refit's target `(h + attention(h)) - h'` takes that for granted. Layers that scale the sum's
terms (Granite), put a norm between them (Gemma 2, OLMo 2) or run the MLP beside the attention
(GPT-NeoX) do otherwise.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_eigen.calibration.job import Job
from vllm_eigen.common.errors import UsageError

_TOLERANCE = 1e-3
"""Of the outputs, relative to their norm: far above rounding, far below what a scale changes."""


def check_plain_residual(job: Job) -> None:
    """Refuse a model whose output projections cannot be refitted.

    With `c - h` in the place of attention(h) the layer's output must not depend on h.

    Raises:
        UsageError: names the model and the option.
    """
    source = job.model.source
    if len(job.model.compressed_layers) < job.model.num_layers:
        raise UsageError(
            f"--refit does not fit {source.folder}: some of its layers are not compressed; pass "
            "--no-refit"
        )
    layer = job.model.layer(0)
    stream = job.stream(job.tokens[:1])
    hidden = stream.hidden
    total = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)) * hidden.std()
    projection = layer.get_submodule(f"{source.family.attention}.{source.family.o_proj}")
    outputs = []
    for states in (hidden, hidden.flip(1)):
        replacement = (total - states).to(job.model.device)

        def replace(
            module: nn.Module, args: object, output: torch.Tensor, new: torch.Tensor = replacement
        ) -> torch.Tensor:
            return new.reshape(output.shape)

        handle = projection.register_forward_hook(replace)
        try:
            outputs.append(stream.run(0, layer, states))
        finally:
            handle.remove()
    if float((outputs[0] - outputs[1]).norm()) > _TOLERANCE * float(outputs[0].norm()):
        raise UsageError(
            f"--refit does not fit {source.folder}: its layers do not add the attention's output "
            "to the hidden state as it is (a scaled residual or a norm after it); pass --no-refit"
        )
