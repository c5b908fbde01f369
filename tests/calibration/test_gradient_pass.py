# SPDX-License-Identifier: Apache-2.0
"""The gradient pass against autograd through the whole transformers model."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.calibration.tiny import MAKERS, build_model, save_model
from vllm_eigen.calibration.gradient_cost import gradient_cost
from vllm_eigen.calibration.gradient_pass import gradient_pass
from vllm_eigen.calibration.job import Job, Recipe
from vllm_eigen.calibration.model import device
from vllm_eigen.calibration.model.hidden_states import HiddenStates
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.sampled_labels import uniforms
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.state import State
from vllm_eigen.calibration.statistics.samples import LayerSamples
from vllm_eigen.checkpoint.families import FAMILIES
from vllm_eigen.common.errors import InputError, OutputError
from vllm_eigen.common.progress import Reporter

ROOT = Path(__file__).parents[2]
WINDOWS, LENGTH = 5, 24
TOKENS = torch.randint(3, 60, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
NAMES = ("key", "value", "key_gradient", "value_gradient")


exact_pass = partial(gradient_pass, bfloat16=False)


def job_of(folder: Path, **options: Any) -> Job:
    source = open_source(str(folder))
    return Job(
        model=LayerwiseModel(source, torch.device("cpu"), eager=False),
        recipe=Recipe.resolve(source, "paper"),
        tokens=options.pop("tokens", TOKENS),
        state=State(options.pop("state", None)),
        reporter=Reporter(quiet=True),
        **options,
    )


def assert_equal(left: LayerSamples, right: LayerSamples) -> None:
    for name in NAMES:
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def reference(model: Any, kind: str, tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Keys, values and their gradients by one backward pass in float64."""
    model = model.double()
    family = next(item for item in FAMILIES if item.model_type == kind)
    seen: list[list[torch.Tensor]] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if clip:
            output = output.clamp(-clip, clip)
        output.retain_grad()
        seen.append([output])
        return output

    clip = model.config.attn_config.clip_qkv if kind == "mpt" else None
    last = family.qkv_proj, family.k_norm or family.k_proj, family.v_proj
    layers = getattr(model.get_submodule(family.decoder), family.layers)
    for index in family.compressed_layers(model.config.to_dict()):
        layer = layers[index]
        attention = getattr(layer, family.attention)
        for name in last[:1] if family.qkv_proj else last[1:]:
            getattr(attention, name).register_forward_hook(keep)
    logits = model(tokens).logits
    probs = logits.detach().softmax(-1)
    draws = uniforms(range(len(tokens)), tokens.shape[1], 0)
    labels = torch.searchsorted(probs.cumsum(-1), draws[..., None], right=True)
    loss = -logits.log_softmax(-1).gather(-1, labels).sum()
    loss.backward()
    found = [(item[0].detach(), item[0].grad) for item in seen]
    if family.qkv_proj:
        sizes = family.geometry(model.config.to_dict()).qkv_sizes
        halves = [(item[0].split(sizes, -1), item[1].split(sizes, -1)) for item in found]
        return [dict(zip(NAMES, (*v[1:], *g[1:]), strict=True)) for v, g in halves]
    pairs = list(zip(found[::2], found[1::2], strict=True))
    if family.heads_first:
        # Values are projected before keys are normed there.
        pairs = [((k[0].transpose(1, 2), k[1].transpose(1, 2)), v) for v, k in pairs]
    return [dict(zip(NAMES, (k[0], v[0], k[1], v[1]), strict=True)) for k, v in pairs]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in sorted(MAKERS)),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "head_dim": 4}),
        ("opt", {"tie_word_embeddings": True, "word_embed_proj_dim": 6}),
        ("opt", {"do_layer_norm_before": False}),
        ("mpt", {"attn_config": {"clip_qkv": 0.5}}),
    ],
    ids=str,
)
def test_equals_autograd_through_the_whole_model(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = build_model(kind, **changes)
    job = job_of(save_model(model, tmp_path))
    expected = reference(model, kind, job.tokens)
    found = dict(exact_pass(job))
    assert list(found) == {"gemma3_text": [3, 1], "gemma2": [1]}.get(kind, [1, 0])
    for samples, wanted_ones in zip(reversed(found.values()), expected, strict=True):
        for name in NAMES:
            got, wanted = getattr(samples, name), wanted_ones[name].reshape(samples.key.shape)
            assert got.dtype == torch.float32
            error = float((got - wanted).abs().max() / wanted.abs().max())
            assert error < 1e-4, name
        assert (samples.rotation is None) == (kind in ("opt", "mpt"))
        if samples.rotation is not None:
            rotary = job.model.inverse_frequencies()
            assert rotary is not None
            assert samples.rotation.cos.shape == (1, LENGTH, len(rotary))


def test_batches_and_spilling_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(build_model("llama", num_hidden_layers=3), tmp_path / "model")
    kept = list(exact_pass(job_of(folder)))
    hidden = 4 * WINDOWS * LENGTH * 32
    for limit in (0, 2 * hidden):  # all in files; one layer's input in memory
        spilled = exact_pass(job_of(folder, memory_limit=limit, state=tmp_path / "state"))
        for (index, left), (same, right) in zip(kept, spilled, strict=True):
            assert index == same
            assert_equal(left, right)
    assert not list((tmp_path / "state").glob("activations*"))
    monkeypatch.setitem(device.BATCH_TOKENS, "cpu", 2 * LENGTH)
    for (_, left), (_, right) in zip(kept, exact_pass(job_of(folder)), strict=True):
        for name in NAMES:
            wanted = getattr(left, name)
            scale = float(wanted.abs().max())
            torch.testing.assert_close(getattr(right, name), wanted, rtol=0, atol=1e-5 * scale)


def test_a_resumed_pass_goes_on_with_equal_bits(tmp_path: Path) -> None:
    folder = save_model(build_model("qwen3", num_hidden_layers=4), tmp_path)
    whole = dict(exact_pass(job_of(folder)))
    rest = dict(exact_pass(job_of(folder), below=2))
    assert list(rest) == [1, 0]
    for index, samples in rest.items():
        assert_equal(samples, whole[index])
    assert not list(exact_pass(job_of(folder), below=0))


def test_windows_have_labels_of_their_own() -> None:
    both = uniforms(range(2), LENGTH, 0)
    assert torch.equal(uniforms(range(1, 2), LENGTH, 0)[0], both[1])
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", "layer 1 gives NaN"),
        ("lm_head.weight", "output projection has a gradient of NaN"),
    ],
)
def test_a_damaged_model_is_one_line(name: str, message: str, tmp_path: Path) -> None:
    folder = save_model(build_model("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message) as caught:
        list(exact_pass(job_of(folder)))
    assert "\n" not in str(caught.value)


def test_bfloat16_gives_nearly_the_same_second_moments(tmp_path: Path) -> None:
    folder = save_model(build_model("qwen2", num_hidden_layers=3), tmp_path)
    passes = [dict(gradient_pass(job_of(folder), bfloat16=item)) for item in (False, True)]
    for index in range(3):
        for name in NAMES:
            exact, near = (second_moment(getattr(item[index], name)) for item in passes)
            error = float((near - exact).norm() / exact.norm())
            # Some tokens draw another label: the prediction moves across their random number.
            assert error < (0.1 if name.endswith("gradient") else 0.01), (index, name)


def second_moment(samples: torch.Tensor) -> torch.Tensor:
    rows = samples.double().flatten(0, 1)
    return torch.einsum("thi,thj->hij", rows, rows)


PEAK = """
import re, sys
from pathlib import Path
import torch
from tests.calibration.test_gradient_pass import exact_pass, job_of
torch.set_num_threads(1)
tokens = torch.randint(3, 60, (64, 64))
job = job_of(Path(sys.argv[1]), tokens=tokens, memory_limit=int(sys.argv[2]))
for _ in exact_pass(job):
    pass
# Not ru_maxrss: that of a child starts from its parent's.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.slow
def test_what_is_spilled_takes_no_memory(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "head_dim": 8, "num_key_value_heads": 1}
    model = build_model("llama", num_hidden_layers=24, max_position_embeddings=64, **shape)
    folder = save_model(model, tmp_path)
    peaks = []
    for limit in (0, 1 << 30):
        command = [sys.executable, "-c", PEAK, str(folder), str(limit)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=400, check=True, cwd=ROOT
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] > 20 * 64 * 64 * 256 * 4


class _Products(TorchDispatchMode):
    """Counts the operations of matrix products while open."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # products inside composed operations too
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.flops += 2 * args[-2].numel() * args[-1].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "mpt", "opt"])
def test_foretold_products_are_those_made(kind: str, tmp_path: Path) -> None:
    job = job_of(save_model(build_model(kind), tmp_path))
    source, layer = job.model.source, job.model.layer(0)
    cost = gradient_cost(
        source.geometry,
        layer_parameters=sum(item.numel() for item in layer.parameters()),
        head_parameters=source.vocab_size * source.geometry.hidden_size,
        tokens=WINDOWS * LENGTH,
        length=LENGTH,
        memory_limit=0,
    )
    with _Products() as products:
        list(gradient_pass(job))
    assert cost.layer_flops + cost.head_flops == pytest.approx(products.flops, rel=0.05)


@pytest.mark.parametrize("kept", range(5))
def test_hidden_states_come_back(kept: int, tmp_path: Path) -> None:
    values = torch.randn(4, 3, 2, 5)
    parts = (slice(0, 2), slice(2, 3))
    limit = kept * values[0].nbytes
    with HiddenStates(4, (3, 2, 5), torch.device("cpu"), limit, tmp_path) as states:
        for slot, hidden in enumerate(values):
            for part in parts:
                states.put(slot, part, hidden[part])
        assert list(tmp_path.iterdir()) == []
        states.put(3, parts[1], -values[3][parts[1]])
        for slot, hidden in reversed(list(enumerate(values))):
            assert torch.equal(states.get(slot, parts[0]), hidden[:2])
            assert torch.equal(states.get(slot, parts[1]), hidden[2:] * (-1 if slot == 3 else 1))
            states.drop(slot)


def test_a_full_disk_is_an_error_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OutputError, match="No space left"):
        HiddenStates(4, (3, 2, 5), torch.device("cpu"), 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_logits_may_have_been_asked_for_before(tmp_path: Path) -> None:
    """Benchmarks measure the base model before they calibrate on it."""
    job = job_of(save_model(build_model("llama"), tmp_path))
    job.model.logits(job.tokens[:1], torch.zeros(1, LENGTH, 32))
    assert [index for index, _ in gradient_pass(job)] == [1, 0]
