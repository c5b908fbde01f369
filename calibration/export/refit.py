# SPDX-License-Identifier: Apache-2.0
"""Fit the output projections to what compressed heads give them; second pass of a calibration.

The base and the compressed model stream side by side. At every layer the attention of the
compressed one is fitted to take its hidden state to the *base's*, so that a layer also corrects
what the layers before it have lost:

    min  sum_tokens | (h + attention(h)) - h' - c' W_o |^2 / |h + attention(h)|^2
         + ridge * |W_o - W_o,base|^2

with h, h' the hidden states of the base and the compressed model and c' the attended values of
the compressed one, for layers that add them as they are (`residual`). Errors count relative to the
hidden state, as the norm that follows divides by its size: that of a text's first token can be a
thousand times larger than others. W_o of all heads together is least squares. Where a latent head
serves one query head, the value encoders are fitted with it (`regress`). Ranks, formats and shapes
stay; the new W_o takes the base's place and is folded like it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from vllm_eigen.calibration.export.regress import Regression, Sums
from vllm_eigen.calibration.job import Job
from vllm_eigen.calibration.methods.basis import Basis, LayerBases
from vllm_eigen.calibration.model.activations import ActivationStream
from vllm_eigen.calibration.model.fold import repeat
from vllm_eigen.calibration.model.hooks import compress
from vllm_eigen.calibration.truncated import TruncatedModel

PRIOR_TOKENS = 1.0
"""Pull to the base's projection: that of so many tokens for each of its inputs in which it is
right. With much less, 4,096 tokens make models worse than no refit; with many it hardly matters.
"""
SWEEPS = 3
"""Passes over the heads that fit the encoders; more gain little."""
TOKENS = 64
"""Tokens for each dimension of the hidden state, in whole windows; more gain little."""
_WEIGHTS = ("weight", "bias")
_TINY = 1e-12
"""Least energy of a hidden state, where errors are relative to it."""


def refit(job: Job, compressed: TruncatedModel) -> TruncatedModel:
    """The compressed model with fitted output projections, and the value bases that go with them.

    Layers before the first that loses anything stay as they are.

    Args:
        compressed: bases and ranks over the job's base model.
    """
    base_model, family = job.model, job.model.source.family
    needed = TOKENS * base_model.source.geometry.hidden_size
    tokens = job.tokens[: max(1, -(-needed // job.tokens.shape[1]))]
    base, eigen = job.stream(tokens), job.stream(tokens)
    pairs = [(rank.rank_k, rank.rank_v) for rank in compressed.ranks]
    name = "refit-" + hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
    job.reporter.stage("refitting", base_model.num_layers * base.batches)
    changed: dict[str, torch.Tensor] = {}
    lossless = True
    for index in range(base_model.num_layers):
        lossless = lossless and compressed.is_lossless(index)
        layer = base_model.layer(index)
        known = f"{name}-{index:04d}"
        found = None if lossless else job.state.read_tensors(known)
        if lossless or found is not None:
            for _ in base.advance(index, layer):
                job.reporter.step()
        else:
            fit = _LayerFit(job, compressed, index, layer)
            value, tensors = fit.run(base, eigen, job.reporter.step)
            found = job.state.write_tensors(known, {**tensors, **value.tensors()})
        if found is not None:
            projection = {key: found.pop(key) for key in _WEIGHTS if key in found}
            path = f"{family.attention_path(index)}.{family.o_proj}"
            changed |= {f"{path}.{key}": tensor for key, tensor in projection.items()}
            _set(layer.get_submodule(f"{family.attention}.{family.o_proj}"), projection)
            bases = list(compressed.bases)
            bases[index] = replace(_truncatable(compressed, index), value=Basis(**found))
            compressed = replace(compressed, bases=tuple(bases))
        if index + 1 == base_model.num_layers:
            break  # the last layer's output is not used
        with compressed.hooks(index, layer):
            for _ in eigen.advance(index, layer):
                pass
    source = replace(base_model.source, changed=changed)
    return replace(compressed, model=base_model.with_source(source))


def _set(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace parameters of a loaded layer, as loading the changed layer would."""
    for name, tensor in tensors.items():
        old = module.get_parameter(name)
        setattr(module, name, nn.Parameter(tensor.to(old.device), requires_grad=False))


class _Stop(Exception):  # noqa: N818 - no error
    """Ends a forward pass of which no more is needed."""


class _LayerFit:
    """One layer's regression.

    Its features are the values as each query head attends to them, before they are compressed;
    of a latent head of several KV heads, after.
    """

    def __init__(self, job: Job, compressed: TruncatedModel, index: int, layer: nn.Module) -> None:
        source, recipe = job.model.source, job.recipe
        family, geometry = source.family, source.geometry
        bases, ranks = _truncatable(compressed, index), compressed.ranks[index]
        self._index, self._layer, self._device = index, layer, job.model.device
        self._heads, self._size = geometry.num_heads, geometry.head_size
        self._o_proj = layer.get_submodule(f"{family.attention}.{family.o_proj}")
        self._value, self._rank = bases.value, ranks.rank_v
        self._grouped = recipe.head_group > 1
        alone = not self._grouped and geometry.num_heads == geometry.num_kv_heads
        self._fits_encoders = alone and self._rank < self._size
        maps = bases.at(ranks)
        self._compressed = partial(
            compress,
            layer,
            family,
            geometry,
            recipe.key_mode,
            maps.key,
            maps.value if self._grouped else None,
        )

    def run(
        self, base: ActivationStream, eigen: ActivationStream, step: Callable[[], None]
    ) -> tuple[Basis, dict[str, torch.Tensor]]:
        """The value basis and the projection's tensors; moves the base's stream past the layer."""
        weight, bias = (getattr(self._o_proj, name) for name in ("weight", "bias"))
        sums = self._sums(base, eigen, step, centred=bias is not None)
        split = weight.double().mT.reshape(self._heads, self._size, -1)
        problem = Regression(
            sums.gram.reshape(self._heads, self._size, self._heads, self._size),
            sums.cross.reshape(split.shape),
        ).with_ridge(split, PRIOR_TOKENS * self._heads * self._size / sums.tokens)
        if self._grouped:
            unit = torch.eye(self._size, dtype=torch.float64, device=self._device)
            encoders = unit.expand(self._heads, -1, -1)
        else:
            encoders = repeat(self._value.at(self._rank)[0].to(self._device), self._heads)
        decoders = problem.decoders(encoders)
        value = self._value
        if self._fits_encoders:
            for _ in range(SWEEPS):
                encoders, decoders = problem.sweep(encoders, decoders)
            value = _basis(self._value, problem.equalized(encoders, decoders).cpu())
        maps = (encoders @ decoders).flatten(0, 1)
        tensors = {"weight": maps.mT.float()}
        if bias is not None:
            tensors["bias"] = (sums.target_mean - sums.feature_mean @ maps).float()
        return value, tensors

    def _sums(
        self,
        base: ActivationStream,
        eigen: ActivationStream,
        step: Callable[[], None],
        centred: bool,
    ) -> Sums:
        sums = Sums(self._heads * self._size, base.hidden.shape[-1], self._device)
        for part in base.batch_slices(len(base)):
            hidden = base.hidden[part].to(self._device, copy=True)  # overwritten below
            gap = hidden - eigen.hidden[part].to(self._device)
            with self._watch_projection() as exact:
                base.hidden[part] = base.run(self._index, self._layer, base.hidden[part])
            with self._compressed(), self._watch_projection(stop=True) as found:
                eigen.run(self._index, self._layer, eigen.hidden[part])
            energy = (hidden + exact["output"]).square().mean(-1)
            sums.add(found["input"], exact["output"] + gap, 1 / energy.clamp(min=_TINY))
            step()
        return sums.centred() if centred else sums

    @contextlib.contextmanager
    def _watch_projection(self, *, stop: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Input and output of the output projection, while open.

        Args:
            stop: end the forward pass there.
        """
        seen: dict[str, torch.Tensor] = {}

        def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            seen.update(input=args[0], output=output)
            if stop:
                raise _Stop

        handle = self._o_proj.register_forward_hook(hook)
        try:
            yield seen
        except _Stop:
            pass
        finally:
            handle.remove()


def _truncatable(compressed: TruncatedModel, index: int) -> LayerBases:
    """A layer's bases; those that are coded already cannot be fitted."""
    found = compressed.bases[index]
    assert isinstance(found, LayerBases)
    return found


def _basis(old: Basis, encoder: torch.Tensor) -> Basis:
    """A basis whose first directions are `encoder` [num_latent_heads, latent_size, rank]."""
    rank = encoder.shape[-1]
    rest = torch.linalg.qr(encoder, mode="complete")[0][:, :, rank:]
    whole = torch.cat([encoder, rest], dim=-1)
    equalized = torch.tensor(True)
    return replace(old, encoder=whole, decoder=torch.linalg.inv(whole), equalized=equalized)
