# SPDX-License-Identifier: Apache-2.0
"""Every family streams, calibrates and folds like the model it describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.calibration.model.test_fold import folded
from tests.calibration.tiny import MAKERS, build_model, read_config, save_model
from vllm_eigen.calibration.model.activations import ActivationStream
from vllm_eigen.calibration.model.compressed import load_reference
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.source import Weights, open_source
from vllm_eigen.checkpoint.families import family_of
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import InputError

Command = Callable[..., tuple[int, str, str]]


@st.composite
def configurations(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A family and a random tiny configuration of it."""
    kind = draw(st.sampled_from(sorted(MAKERS)))
    changes: dict[str, Any] = {"tie_word_embeddings": draw(st.booleans())}
    if kind in ("opt", "mpt"):
        heads, size = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([2, 4, 8]))
        width = heads * size
        if kind == "opt":
            changes |= {
                "num_attention_heads": heads,
                "hidden_size": width,
                "word_embed_proj_dim": draw(st.sampled_from([width, 6])),
                "do_layer_norm_before": draw(st.booleans()),
                "enable_bias": draw(st.booleans()),
            }
        else:
            clip = draw(st.sampled_from([None, 0.5]))
            changes |= {"n_heads": heads, "d_model": width, "attn_config": {"clip_qkv": clip}}
        return kind, changes
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    # Half of a head of GLM-4 and StableLM rotates, in pairs.
    size = draw(st.sampled_from([4, 8] if kind in ("glm4", "stablelm") else [2, 4, 8]))
    changes |= {"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads}
    if kind in ("granite", "olmo2", "phi3", "qwen2", "stablelm", "starcoder2"):
        changes["hidden_size"] = kv_heads * group * size
    else:
        changes |= {"head_dim": size, "hidden_size": kv_heads * group * 4}
    if kind in ("glm4", "granite", "llama", "olmo2", "qwen3"):
        changes["attention_bias"] = draw(st.booleans())
    return kind, changes


@settings(max_examples=30, deadline=None)
@given(configuration=configurations(), seed=st.integers(0, 99))
def test_full_rank_is_lossless(
    configuration: tuple[str, dict[str, Any]],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    kind, changes = configuration
    folder = tmp_path_factory.mktemp(kind)
    model = build_model(kind, seed, **changes)
    base = save_model(model, folder / "base")
    source = open_source(str(base))
    size, count = source.geometry.head_size, len(source.family.compressed_layers(source.config))
    output, _ = folded(base, folder / "eigen", [(size, size)] * count, seed=seed)
    tokens = torch.randint(3, 60, (1, 20))
    with torch.no_grad():
        expected = model.double()(tokens).logits
        got = load_reference(output).double()(tokens).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 2e-5


@pytest.mark.parametrize(
    ("kind", "eager"),
    [
        *((kind, False) for kind in sorted(MAKERS)),
        *((kind, True) for kind in ("gemma3_text", "glm4", "llama", "mpt", "opt", "qwen3")),
    ],
)
def test_streaming_equals_the_whole_model(kind: str, eager: bool, tmp_path: Path) -> None:
    model = build_model(kind)
    source = open_source(str(save_model(model, tmp_path)))
    layerwise = LayerwiseModel(source, torch.device("cpu"), eager=eager)
    tokens = torch.randint(3, 60, (5, 24))
    stream = ActivationStream(layerwise, tokens, memory_limit=0)
    for index in range(layerwise.num_layers):
        for _ in stream.advance(index, layerwise.layer(index)):
            pass
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(
        layerwise.logits(tokens, stream.hidden), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *(("paper", kind) for kind in ("mistral", "qwen2", "qwen3", "gemma3_text", "mpt")),
        *(("sensitivity", kind) for kind in ("mistral", "qwen2", "qwen3", "gemma3_text", "mpt")),
        *(("sensitivity", kind) for kind in ("gemma2", "glm4", "mixtral", "phi3")),
    ],
)
def test_calibrates(
    method: str,
    kind: str,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    output = tmp_path / "out"
    small = ("--samples", 12, "--seq-len", 24, "--method", method)
    # A norm follows their attention.
    small += ("--no-refit",) if kind in ("gemma2", "gemma3_text", "glm4") else ()
    arguments = ("--output", output, "--kv-ratio", 0.75, "--text", text_file, *small)
    status, _, error = command("calibrate", make_model(kind), *arguments)
    assert status == 0, error
    eigen = validate(output)
    assert abs(eigen.kv_ratio - 0.75) < 0.05
    assert eigen.projections == ("values-folded" if kind in ("qwen3", "gemma3_text") else "folded")
    if kind != "qwen2":  # transformers insists on Qwen's own tokenizer there
        status, _, error = command("evaluate", output, "--text", text_file)
        assert status == 0, error


@pytest.mark.parametrize(
    "changes", [{"qk_ln": True}, {"alibi": False}, {"prefix_lm": True}], ids=str
)
def test_mpt_options_without_a_reference_are_refused(
    changes: dict[str, bool], make_model: Callable[..., Path], text_file: Path, tmp_path: Path,
    command: Command,
) -> None:  # fmt: skip
    model = make_model("mpt", attn_config=changes)
    arguments = ("--output", tmp_path / "out", "--kv-ratio", 0.5, "--text", text_file)
    status, _, error = command("calibrate", model, *arguments)
    assert status == 1
    assert f"attn_config.{next(iter(changes))}" in error


def test_a_model_with_windows_calibrates_coded(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    """Layers with full attention get equal bytes; those with windows stay as they are, bit by
    bit; the dry run foretells it."""
    base, output = make_model("gemma3_text", num_attention_heads=2, head_dim=32), tmp_path / "out"
    arguments = (base, "--output", output, "--kv-ratio", 0.3, "--text", text_file)
    arguments += ("--samples", 12, "--seq-len", 24)
    status, printed, error = command("calibrate", *arguments, "--dry-run")
    assert status == 0, error
    assert "2 of 5 layers" in printed
    assert "KV ratio        0.2969" in printed  # whole bytes of all layers together
    assert (
        "of 512" in printed
    )  # two layers of two heads, 32 elements of keys and of values, 16 bits
    status, _, error = command("calibrate", *arguments)
    assert status == 0, error
    eigen = validate(output)
    assert eigen.kept_layers == (0, 2, 4)
    sizes = [layer.num_bytes(2) for layer in eigen.layers]
    assert eigen.coded
    assert all(0.2 * 128 < size <= 0.3 * 128 for size in sizes)
    whole, written = (Weights(folder, family_of(read_config(base))) for folder in (base, output))
    for index in eigen.kept_layers:
        names = [name for name in whole if f".layers.{index}." in name]
        assert names
        assert all(torch.equal(whole.get(name), written.get(name)) for name in names)
    damaged = read_config(output)
    damaged["eigen"]["kept_layers"] = [0, 1, 4]
    (output / "config.json").write_text(json.dumps(damaged))
    status, _, error = command("inspect", output)
    assert status == 1
    assert "compresses layers [2, 3]" in error


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_are_fused_for_transformers_and_written_as_they_were(
    kind: str, tmp_path: Path
) -> None:
    model = build_model(kind)
    source = open_source(str(save_model(model, tmp_path / "base")))
    fused = {name: source.tensors.get(name) for name in source.tensors}
    whole = model.state_dict()
    assert {name for name in whole if name.endswith("experts.gate_up_proj")} <= set(fused)
    assert set(fused) == set(whole)
    assert all(torch.equal(fused[name], whole[name]) for name in whole)
    output, _ = folded(source.folder, tmp_path / "eigen", [(4, 4)] * 2)
    written = Weights(output, source.family)
    experts = [name for name in source.weights if ".experts." in name]
    assert len(experts) == 3 * 4 * (1 if kind == "qwen3_moe" else 2)
    assert all(torch.equal(written.get(name), source.weights.get(name)) for name in experts)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder = save_model(build_model("mixtral"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    layerwise = LayerwiseModel(open_source(str(folder)), torch.device("cpu"))
    layerwise.layer(0)
    with pytest.raises(InputError, match=r"experts\.2\.w3\.weight is missing"):
        layerwise.layer(1)
