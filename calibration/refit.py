"""Fit the output projections to what compressed heads hand them; second pass of a calibration.

The base and the compressed model stream side by side. At every layer the attention of the
compressed one is fitted to take its hidden state to the *base's*, so that a layer also corrects
what the layers before it have lost:

    min  | (h + attention(h)) - h' - c' W_o |^2  +  ridge * |W_o - W_o,base|^2

with h, h' the hidden states of the base and the compressed model and c' the attended values of
the compressed one. W_o of all heads together is least squares. Where a latent head serves one
query head, the value encoders are chosen anew with it (`regress`). Ranks, formats and shapes stay;
the new W_o stands in the base's place and is folded like it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from calibration.fold import repeat
from calibration.methods.base import Basis, LayerBases, Method
from calibration.options import Options
from calibration.progress import Reporter
from calibration.regress import Regression
from calibration.state import State
from calibration.stream import Skeleton, Stream
from calibration.taps import compress
from vllm_eigen.checkpoint import LayerRanks
from vllm_eigen.families import KeyMode

RIDGE = 1e-3
"""Pull to the base's projection, relative to the mean energy of what it is applied to. Held-out
perplexity hardly moves from 1e-6 to 1e-2."""
SWEEPS = 3
"""Over the heads, for the encoders; more gain little."""
TOKENS = 64
"""Tokens for each dimension of the hidden state, in whole windows; more gain little."""
_WEIGHTS = ("weight", "bias")


def wanted(options: Options, method: Method) -> bool:
    """Whether to refit; bases alone cannot carry new projections."""
    if options.bases_only or (options.kv_ratio is not None and options.kv_ratio >= 1):
        return False
    return method.refit if options.refit is None else options.refit


def share(skeleton: Skeleton, tokens: torch.Tensor) -> torch.Tensor:
    """The first windows of tokens [num_windows, length], as many as the fit takes."""
    needed = TOKENS * skeleton.source.geometry.hidden_size
    return tokens[: max(1, -(-needed // tokens.shape[1]))]


def refit(
    skeleton: Skeleton,
    base: Stream,
    eigen: Stream,
    bases: Sequence[LayerBases],
    ranks: Sequence[LayerRanks],
    key_mode: KeyMode,
    head_group: int,
    state: State,
    reporter: Reporter,
) -> tuple[list[LayerBases], Skeleton]:
    """Bases for these ranks, and the model with the output projections that go with them.

    Layers before the first that loses anything stay as they are.

    Args:
        skeleton: the base model.
        base, eigen: the calibration text before the first layer, twice.
        state: where finished layers are kept and found again.
    """
    family = skeleton.source.family
    pairs = [(layer.rank_k, layer.rank_v) for layer in ranks]
    name = "refit-" + hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
    reporter.stage("refitting", skeleton.num_layers * base.batches)
    changed: dict[str, torch.Tensor] = {}
    changed_model = skeleton.with_source(replace(skeleton.source, changed=changed))
    result = list(bases)
    lossless = True
    for index, (item, rank) in enumerate(zip(bases, ranks, strict=True)):
        full = item.key.full_rank, item.value.full_rank
        lossless = lossless and (rank.rank_k, rank.rank_v) == full
        layer = skeleton.layer(index)
        known = f"{name}-{index:04d}"
        found = None if lossless else state.recall_tensors(known)
        if lossless or found is not None:
            for _ in base.advance(index, layer):
                reporter.step()
        else:
            job = _Layer(skeleton, index, layer, item, rank, key_mode, head_group)
            value, tensors = job.fit(base, eigen, reporter.step)
            found = state.remember_tensors(known, {**tensors, **value.tensors()})
        if found is not None:
            path = f"{family.attention_path(index)}.{family.o_proj}"
            changed |= {f"{path}.{key}": found.pop(key) for key in _WEIGHTS if key in found}
            item = result[index] = replace(item, value=Basis(**found))
            layer = changed_model.layer(index)
        if index + 1 == len(bases):
            break  # nobody needs what the last layer makes of it
        maps = item.key.at(rank.rank_k), item.value.at(rank.rank_v)
        with compress(layer, family, skeleton.source.geometry, key_mode, *maps):
            for _ in eigen.advance(index, layer):
                pass
    return result, changed_model


class _Seen(Exception):  # noqa: N818 - no error
    """Ends a forward pass of which no more is needed."""


class _Layer:
    """One layer's regression.

    Its features are the values as each query head attends to them, before they are compressed;
    of a latent head of several KV heads, after.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        layer: nn.Module,
        bases: LayerBases,
        ranks: LayerRanks,
        key_mode: KeyMode,
        head_group: int,
    ) -> None:
        family, geometry = skeleton.source.family, skeleton.source.geometry
        self._index, self._layer, self._device = index, layer, skeleton.device
        self._heads, self._size = geometry.num_heads, geometry.head_size
        self._o_proj = layer.get_submodule(f"{family.attention}.{family.o_proj}")
        self._value, self._rank = bases.value, ranks.rank_v
        self._grouped = head_group > 1
        alone = not self._grouped and geometry.num_heads == geometry.num_kv_heads
        self._free = alone and self._rank < self._size
        value = bases.value.at(ranks.rank_v) if self._grouped else None
        self._compressed = partial(
            compress, layer, family, geometry, key_mode, bases.key.at(ranks.rank_k), value
        )

    def fit(
        self, base: Stream, eigen: Stream, step: Callable[[], None]
    ) -> tuple[Basis, dict[str, torch.Tensor]]:
        """The value basis and the projection's tensors; moves the base's stream past the layer."""
        weight, bias = (getattr(self._o_proj, name) for name in ("weight", "bias"))
        sums = self._sums(base, eigen, step, centred=bias is not None)
        split = weight.double().mT.reshape(self._heads, self._size, -1)
        problem = Regression(
            sums.gram.reshape(self._heads, self._size, self._heads, self._size),
            sums.cross.reshape(split.shape),
        ).towards(split, RIDGE)
        if self._grouped:
            unit = torch.eye(self._size, dtype=torch.float64, device=self._device)
            encoders = unit.expand(self._heads, -1, -1)
        else:
            encoders = repeat(self._value.at(self._rank)[0].to(self._device), self._heads)
        decoders = problem.decoders(encoders)
        value = self._value
        if self._free:
            for _ in range(SWEEPS):
                encoders, decoders = problem.sweep(encoders, decoders)
            value = _basis(self._value, problem.evened(encoders, decoders).cpu())
        maps = (encoders @ decoders).flatten(0, 1)
        tensors = {"weight": maps.mT.float()}
        if bias is not None:
            tensors["bias"] = (sums.target_mean - sums.feature_mean @ maps).float()
        return value, tensors

    def _sums(self, base: Stream, eigen: Stream, step: Callable[[], None], centred: bool) -> _Sums:
        sums = _Sums(self._heads * self._size, base.hidden.shape[-1], self._device)
        for part in base.parts(len(base)):
            gap = (base.hidden[part] - eigen.hidden[part]).to(self._device)
            with self._watched() as exact:
                base.hidden[part] = base.run(self._index, self._layer, base.hidden[part])
            with self._compressed(), self._watched(alone=True) as found:
                eigen.run(self._index, self._layer, eigen.hidden[part])
            sums.add(found["input"], exact["output"] + gap)
            step()
        return sums.centred() if centred else sums

    @contextlib.contextmanager
    def _watched(self, *, alone: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """What the output projection is given and gives, while open.

        Args:
            alone: end the forward pass there.
        """
        seen: dict[str, torch.Tensor] = {}

        def look(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            seen.update(input=args[0], output=output)
            if alone:
                raise _Seen

        handle = self._o_proj.register_forward_hook(look)
        try:
            yield seen
        except _Seen:
            pass
        finally:
            handle.remove()


class _Sums:
    """Second moments of features and targets, float64, and their means."""

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram, self.cross = zeros(features, features), zeros(features, targets)
        self.feature_mean, self.target_mean = zeros(features), zeros(targets)
        self._tokens = 0

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Both are [..., tokens, size]."""
        x, y = (item.reshape(-1, item.shape[-1]).double() for item in (features, targets))
        self.gram.addmm_(x.mT, x)
        self.cross.addmm_(x.mT, y)
        self._tokens += len(x)
        self.feature_mean += (x.mean(0) - self.feature_mean) * len(x) / self._tokens
        self.target_mean += (y.mean(0) - self.target_mean) * len(x) / self._tokens

    def centred(self) -> _Sums:
        """About the means, which a bias takes up."""
        self.gram -= self._tokens * torch.outer(self.feature_mean, self.feature_mean)
        self.cross -= self._tokens * torch.outer(self.feature_mean, self.target_mean)
        return self


def _basis(old: Basis, encoder: torch.Tensor) -> Basis:
    """A basis whose first directions are `encoder` [num_latent_heads, latent_size, rank]."""
    rank = encoder.shape[-1]
    rest = torch.linalg.qr(encoder, mode="complete")[0][:, :, rank:]
    whole = torch.cat([encoder, rest], dim=-1)
    mixed = torch.tensor(True)
    return replace(old, encoder=whole, decoder=torch.linalg.inv(whole), mixed=mixed)
