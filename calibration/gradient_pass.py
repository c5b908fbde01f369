# SPDX-License-Identifier: Apache-2.0
"""The pass that weighs what a layer caches: one forward and one backward through the whole model.

The gradient of the model's loss in every cached key and value, for labels drawn from the model's
own prediction: its second moment is the Fisher matrix of the layer's cache, which foretells the KL
divergence that any change of the cache costs. All layers come from one backward pass, so the cost
is linear in layers and tokens. One layer's weights are in memory at a time; its graph is made again
on the way back from its stored input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vllm_eigen.calibration.job import Job
from vllm_eigen.calibration.model.activations import LayerCalls, allocate
from vllm_eigen.calibration.model.bfloat16 import use_bfloat16
from vllm_eigen.calibration.model.device import batch_windows, multiplies_bfloat16
from vllm_eigen.calibration.model.hidden_states import HiddenStates
from vllm_eigen.calibration.model.hooks import tap
from vllm_eigen.calibration.model.sampled_labels import loss_gradient, uniforms
from vllm_eigen.calibration.statistics.samples import LayerSamples
from vllm_eigen.common.errors import InputError


def gradient_pass(
    job: Job, below: int | None = None, *, seed: int = 0, bfloat16: bool | None = None
) -> Iterator[tuple[int, LayerSamples]]:
    """The layers to compress with their samples, the last layer first.

    Equal inputs give equal bits, also where an earlier run stopped: the layers above are run again.

    Args:
        below: the layers from here up are not wanted again; None: all are wanted.
        seed: of the sampled labels.
        bfloat16: compute output projections and MLPs in bfloat16; None: where it is faster.

    Raises:
        InputError: a layer's output or gradient is not finite.
        OutputError: the disk is too small for the activations.
    """
    layers = job.model.num_layers
    wanted = [index for index in job.model.compressed_layers if below is None or index < below]
    if not wanted:
        return
    if bfloat16 is None:
        bfloat16 = multiplies_bfloat16(job.model.device)
    shape = (*job.tokens.shape, job.model.source.geometry.hidden_size)
    with HiddenStates(
        layers + 1, shape, job.model.device, job.memory_limit, job.state.folder
    ) as states:
        step = _Steps(job, states, LayerCalls(job.model), bfloat16)
        job.reporter.stage("gradients", (2 * layers - wanted[0] + 1) * len(step.parts))
        step.embed()
        for index in range(layers):
            step.forward(index)
        step.loss(seed)
        for index in reversed(range(wanted[0], layers)):
            if index not in wanted:
                step.backward(index)
                continue
            samples = step.sampled_backward(index)
            yield index, samples
            del samples  # not kept while the next layer's are made


@dataclass(frozen=True)
class _Steps:
    """The pass, layer by layer.

    Attributes:
        states: slot i holds the input of layer i, the last slot the last layer's output; on the
            way back each is overwritten with the gradient in it.
        calls: calls the layers.
        bfloat16: whether layers compute in it.
    """

    job: Job
    states: HiddenStates
    calls: LayerCalls
    bfloat16: bool

    @property
    def parts(self) -> list[slice]:
        """The windows of each forward call."""
        count, length = self.job.tokens.shape
        batch = batch_windows(self.job.model.device, length)
        return [slice(start, min(start + batch, count)) for start in range(0, count, batch)]

    def embed(self) -> None:
        """Fill the first slot."""
        for part in self.parts:
            self.states.put(0, part, self.calls.embed(self.job.tokens[part]))

    def forward(self, index: int) -> None:
        """Fill slot `index + 1`."""
        layer, finite = self._layer(index), []
        for part in self.parts:
            with torch.inference_mode():
                output = self.calls.layer(index, layer, self.states.get(index, part))
            self.states.put(index + 1, part, output)
            finite.append(torch.isfinite(output).all())
            self.job.reporter.step()
        self._check(f"layer {index} gives", finite)

    def loss(self, seed: int) -> None:
        """Turn the last slot into the gradient of the loss."""
        model, (count, length) = self.job.model, self.job.tokens.shape
        draws, finite = uniforms(range(count), length, seed), []
        for part in self.parts:
            output = self.states.get(model.num_layers, part)
            gradient = loss_gradient(model, output, draws[part])
            self.states.put(model.num_layers, part, gradient)
            finite.append(torch.isfinite(gradient).all())
            self.job.reporter.step()
        self._check("the final norm or the output projection has a gradient of", finite)

    def backward(self, index: int) -> None:
        """Turn slot `index` into the gradient in it, by that in the slot above; free that."""
        layer, finite = self._layer(index), []
        for part in self.parts:
            hidden = self.states.get(index, part).detach().requires_grad_()
            with torch.enable_grad():
                output = self.calls.layer(index, layer, hidden)
            (lower,) = torch.autograd.grad(output, hidden, self.states.get(index + 1, part))
            self.states.put(index, part, lower)
            finite.append(torch.isfinite(lower).all())
            self.job.reporter.step()
        self.states.drop(index + 1)
        self._check(f"layer {index} has a gradient of", finite)

    def sampled_backward(self, index: int) -> LayerSamples:
        """The same, with what the layer caches and the gradient in it."""
        job, geometry = self.job, self.job.model.source.geometry
        shape = (*job.tokens.shape, geometry.num_kv_heads, geometry.head_size)
        names = ("key", "value", "key_gradient", "value_gradient")
        kept = {name: allocate(shape, job.memory_limit, job.state.folder) for name in names}
        layer, finite = self._layer(index), []
        with tap(layer, job.model.source.family, geometry) as seen:
            for part in self.parts:
                hidden = self.states.get(index, part).detach().requires_grad_()
                with torch.enable_grad():
                    output = self.calls.layer(index, layer, hidden)
                cached = (seen["key"], seen["value"])
                lower, *gradients = torch.autograd.grad(
                    output, [hidden, *cached], self.states.get(index + 1, part)
                )
                self.states.put(index, part, lower)
                for name, tensor in zip(names, (*cached, *gradients), strict=True):
                    kept[name][part] = tensor.detach().reshape(-1, *shape[1:])
                finite.append(torch.isfinite(lower).all())
                job.reporter.step()
        self.states.drop(index + 1)
        self._check(f"layer {index} has a gradient of", finite)
        rotation = seen["rotation"]
        return LayerSamples(**kept, rotation=None if rotation is None else rotation.cpu())

    def _layer(self, index: int) -> nn.Module:
        layer = self.job.model.layer(index)
        if self.bfloat16:
            use_bfloat16(layer, self.job.model.source.family)
        return layer

    def _check(self, what: str, finite: list[torch.Tensor]) -> None:
        if not bool(torch.stack(finite).all()):
            raise InputError(
                f"{self.job.model.source.folder}: {what} NaN or infinity; the weights are damaged "
                "or too large for float32"
            )
