# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen calibrate` and `evaluate` end to end on tiny models, good input and bad."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calibration.export.test_scales import calibrated
from tests.calibration.tiny import read_config
from vllm_eigen.checkpoint.shapes import KEY_BASIS
from vllm_eigen.checkpoint.validate import validate

Command = Callable[..., tuple[int, str, str]]
SMALL = ("--samples", 12, "--seq-len", 24, "--method", "paper")


@pytest.mark.parametrize(
    ("method", "group"), [("paper", 1), ("sensitivity", 1), ("sensitivity", 2)]
)
@pytest.mark.parametrize("kv_ratio", [1.0, 0.6])
def test_fast_rope_pairs_read_few_latents(
    method: str,
    group: int,
    kv_ratio: float,
    make_model: Callable[..., Path],
    text_file: Path,
    command: Command,
) -> None:
    options = ("--kv-ratio", kv_ratio, "--method", method, "--head-group", group)
    output = calibrated("llama", options, make_model, text_file, command, head_dim=8)
    found = [
        tensor
        for name, tensor in load_file(output / "model.safetensors").items()
        if name.endswith(KEY_BASIS)
    ]
    assert len(found) == 2
    for basis in found:  # [2 KV heads, rank_k, 8]; RoPE pairs are (0, 4), (1, 5), ..
        for pair in range(4):
            rows = basis[:, :, [pair, pair + 4]]
            assert rows.any()
            assert not rows[:, 2 * group * (pair + 1) :].any()


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("kv_ratio", [0.8, 0.6, 0.4])
def test_ratio_is_met(
    kind: str,
    kv_ratio: float,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    model, output = make_model(kind, hidden_size=64), tmp_path / "out"
    if kind == "opt":
        model = make_model(kind, hidden_size=128, word_embed_proj_dim=128)
    status, _, error = command(
        "calibrate", model, "--output", output, "--kv-ratio", kv_ratio, "--text", text_file, *SMALL
    )
    assert status == 0, error
    eigen = validate(output)
    # The finest step of a tiny model: one rank in all heads of one layer.
    step = 1 / (2 * eigen.head_size * len(eigen.layers))
    assert abs(eigen.kv_ratio - kv_ratio) <= max(0.01, step)
    record = eigen.provenance["calibration"]
    assert record["seq_len"] == 24
    assert record["error_budget"] > 0
    assert str(tmp_path) not in (output / "config.json").read_text()
    assert "perplexity" in (output / "README.md").read_text()


def test_full_ratio_is_exact(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    output = tmp_path / "out"
    arguments = ("--output", output, "--kv-ratio", "1.0", "--text", text_file)
    assert command("calibrate", make_model(), *arguments, *SMALL)[0] == 0
    assert all(layer.rank_k == layer.rank_v == 8 for layer in validate(output).layers)
    status, out, _ = command("evaluate", output, "--text", text_file, "--json")
    assert status == 0
    result = json.loads(out)
    assert set(result) == {
        "engine",
        "base",
        "eigen",
        "kv_ratio",
        "kv_cache_dtype",
        "top1_agreement",
        "kl_per_token",
        "tokens",
        "window",
        "notes",
    }
    assert (result["engine"], result["window"], result["notes"]) == ("transformers", 64, [])
    assert result["base"]["perplexity"] == pytest.approx(result["eigen"]["perplexity"], rel=1e-6)
    assert result["kv_ratio"] == 1
    assert result["kl_per_token"] < 1e-9
    assert result["top1_agreement"] == 1


def test_budget_and_ratio_are_inverse(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    model = make_model(hidden_size=128, num_hidden_layers=3)
    tail = ("--text", text_file, *SMALL)
    assert command("calibrate", model, "--output", tmp_path / "a", "--kv-ratio", 0.6, *tail)[0] == 0
    asked = validate(tmp_path / "a")
    budget = asked.provenance["calibration"]["error_budget"]
    assert (
        command("calibrate", model, "--output", tmp_path / "b", "--error-budget", budget, *tail)[0]
        == 0
    )
    found = validate(tmp_path / "b")
    # Algorithm 1 walks in steps of 0.02, its inverse interpolates between wider ones.
    assert abs(found.kv_ratio - asked.kv_ratio) < 0.06
    assert max(found.provenance["calibration"]["layer_errors"]) <= budget


def test_same_seed_same_bytes_and_the_tokenizer_comes_along(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    model = make_model("opt")
    for name in ("a", "b"):
        arguments = ("--output", tmp_path / name, "--kv-ratio", 0.5, "--text", text_file)
        assert command("calibrate", model, *arguments, *SMALL)[0] == 0
    first = (tmp_path / "a/model.safetensors").read_bytes()
    assert first == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/tokenizer.json").exists()
    config = read_config(tmp_path / "a")
    assert config["architectures"] == ["EigenOPTForCausalLM"]
    assert config["model_type"] == "opt"


def test_shards_in_and_bfloat16(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    from tests.calibration.tiny import build_model, save_model

    model = save_model(build_model("llama").bfloat16(), tmp_path / "s", max_shard_size="10KB")
    assert len(list(model.glob("*.safetensors"))) > 2
    arguments = ("--output", tmp_path / "out", "--kv-ratio", 0.7, "--text", text_file)
    assert command("calibrate", model, *arguments, *SMALL)[0] == 0
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def _damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
BAD: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("ratio 0", ("--kv-ratio", 0), None, "out of range"),
    ("ratio 2", ("--kv-ratio", 2), None, "out of range"),
    ("ratio nan", ("--kv-ratio", "nan"), None, "out of range"),
    ("ratio tiny", ("--kv-ratio", 0.001), None, "ask for more"),
    ("budget", ("--error-budget", -1), None, "out of range"),
    ("neither", (), None, "pass one of --kv-ratio"),
    ("samples", ("--kv-ratio", 0.5, "--samples", 0), None, "--samples 0"),
    ("short", ("--kv-ratio", 0.5, "--text", "SHORT"), None, "too short"),
    ("empty", ("--kv-ratio", 0.5, "--text", "EMPTY"), None, "is empty"),
    ("no text", ("--kv-ratio", 0.5, "--text", "NONE"), None, "cannot be read"),
    ("binary", ("--kv-ratio", 0.5, "--text", "BINARY"), None, "not UTF-8"),
    ("nan", ("--kv-ratio", 0.5), lambda t: t[Q][0].fill_(float("nan")), "NaN or infinity"),
    ("inf", ("--kv-ratio", 0.5), lambda t: t[NORM][0].fill_(-float("inf")), "NaN or infinity"),
    ("huge", ("--kv-ratio", 0.5), lambda t: t[Q].fill_(3e38), "layer 1 gives NaN or infinity"),
    (
        "huge head",
        ("--kv-ratio", 0.5, "--method", "sensitivity"),
        lambda t: t[HEAD].fill_(3e38),
        "output holds NaN or infinity",
    ),
    ("no bits", ("--kv-bits", 0), None, "--kv-bits 0 is out of range"),
    ("many bits", ("--kv-bits", 17), None, "--kv-bits 17 is out of range"),
    ("missing", ("--kv-ratio", 0.5), lambda t: t.pop(Q), "is missing"),
    ("no head", ("--kv-ratio", 0.5), lambda t: t.pop(HEAD), f"{HEAD} is missing and"),
    ("shape", ("--kv-ratio", 0.5), lambda t: t.update({Q: t[Q][:3].clone()}), "config.json asks"),
]


@pytest.mark.parametrize(("arguments", "damage", "message"), [row[1:] for row in BAD],
                         ids=[row[0] for row in BAD])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[Any, ...],
    damage: Any,
    message: str,
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    model = make_model()
    if damage:
        _damage(model, damage)
    texts = {name: tmp_path / name for name in ("SHORT", "EMPTY", "NONE", "BINARY")}
    texts["SHORT"].write_text("w1 w2")
    texts["EMPTY"].write_text(" \n<|endoftext|>\n")
    texts["BINARY"].write_bytes(b"\xff\xfe\x00")
    before = sorted(tmp_path.iterdir())
    given = [texts.get(item, item) for item in arguments]
    text = () if "--text" in given else ("--text", text_file)
    size = tuple(item for item in SMALL if "--samples" not in given or item not in SMALL[:2])
    status, out, error = command(
        "calibrate", model, "--output", tmp_path / "out", *size, *text, *given
    )
    assert status in (1, 2)
    last = error.strip().splitlines()[-1]
    assert message in last
    assert out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_bad_models(text_file: Path, tmp_path: Path, command: Command, make_model: Any) -> None:
    tail = ("--output", tmp_path / "out", "--kv-ratio", 0.5, "--text", text_file)
    status, _, error = command("calibrate", tmp_path / "nowhere", *tail)
    assert status == 1
    assert "neither a folder nor a model" in error
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["BertModel"]}')
    status, _, error = command("calibrate", other, *tail)
    assert status == 1
    assert "BertModel" in error
    assert "LlamaForCausalLM" in error
    (other / "config.json").write_text("{")
    assert "not valid JSON" in command("calibrate", other, *tail)[2]
    model = make_model("llama", hidden_size=32)
    (model / "model.safetensors").unlink()
    assert "holds no model.safetensors" in command("calibrate", model, *tail)[2]
    (model / "model.safetensors").write_bytes(b"garbage")
    assert "damaged" in command("calibrate", model, *tail)[2]


def test_missing_shard(text_file: Path, tmp_path: Path, command: Command) -> None:
    from tests.calibration.tiny import build_model, save_model

    model = save_model(build_model("llama"), tmp_path / "s", max_shard_size="20KB")
    sorted(model.glob("*.safetensors"))[1].unlink()
    tail = ("--output", tmp_path / "out", "--kv-ratio", 0.5, "--text", text_file)
    status, _, error = command("calibrate", model, *tail)
    assert status == 1
    assert "shard" in error
    (model / "model.safetensors.index.json").unlink()
    assert "a shard may be absent" in command("calibrate", model, *tail)[2]


def test_damaged_checkpoints_are_refused(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    output = tmp_path / "out"
    tail = ("--output", output, "--kv-ratio", 0.5, "--text", text_file)
    assert command("calibrate", make_model(), *tail, *SMALL)[0] == 0
    _damage(output, lambda t: t[NORM][0].fill_(float("nan")))
    status, _, error = command("evaluate", output, "--text", text_file)
    assert status == 1
    assert "NaN or infinity" in error.splitlines()[-1]
    _damage(output, lambda t: t.pop(NORM))
    status, _, error = command("evaluate", output, "--text", text_file)
    assert status == 1
    assert NORM in error.splitlines()[-1]
    _damage(output, lambda t: t.pop(HEAD))
    for name in ("evaluate", "inspect"):
        status, _, error = command(name, output)
        assert status == 1
        assert f"{HEAD} is missing" in error.splitlines()[-1]
    (output / "model.safetensors").unlink()
    for name in ("evaluate", "inspect", "report"):
        status, _, error = command(name, output)
        assert status == 1
        assert "holds no .safetensors" in error


def test_existing_output_is_refused_first(tmp_path: Path, command: Command) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    tail = ("--output", tmp_path / "out", "--kv-ratio", 0.5, "--text", tmp_path / "none")
    status, _, error = command("calibrate", tmp_path / "no-model", *tail)
    assert status == 1
    assert "--overwrite" in error


def test_odd_texts_and_tokenizers_work(tmp_path: Path, command: Command) -> None:
    """One-token documents, unknown words, no special tokens, tied embeddings, zero keys."""
    from tests.calibration.tiny import build_model, save_model

    model = build_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.zero_()
        model.model.layers[1].self_attn.v_proj.weight[1:] = 0
    folder = save_model(model, tmp_path / "m", bos=False)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text = tmp_path / "t.txt"
    text.write_text("<|endoftext|>".join(["w1", "unheard", "w2 w3"] * 200))
    tail = ("--output", tmp_path / "out", "--kv-ratio", 0.5, "--text", text)
    status, _, error = command("calibrate", folder, *tail, *SMALL)
    assert status == 0, error
    assert "unknown to the tokenizer" in error
    assert validate(tmp_path / "out").kv_ratio <= 0.6
    # A layer whose keys are all zero loses nothing, however little of them is kept.
    status, out, error = command("evaluate", tmp_path / "out", "--text", text, "--json")
    assert status == 0, error
    assert json.loads(out)["kl_per_token"] < 0.1


def test_evaluate_takes_a_text_shorter_than_a_window(
    make_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Command
) -> None:
    output, short = tmp_path / "out", tmp_path / "short.txt"
    tail = ("--output", output, "--kv-ratio", 0.5, "--text", text_file)
    assert command("calibrate", make_model(), *tail, *SMALL)[0] == 0
    short.write_text("w1 w2 w3 w4")
    # A window takes 64 tokens; before each text and each window stands one.
    for text, options, window in (
        (short, (), 6),
        (short, ("--max-tokens", 4), 4),
        (text_file, ("--max-tokens", 20), 20),
        (text_file, ("--max-tokens", 130), 64),
    ):
        status, out, error = command("evaluate", output, "--text", text, "--json", *options)
        assert status == 0, error
        assert json.loads(out)["window"] == window
        assert json.loads(out)["base"]["perplexity"] > 1


def test_evaluate_needs_a_base_it_knows(
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: Any,
) -> None:
    model, output = make_model(), tmp_path / "out"
    arguments = ("--output", output, "--kv-ratio", 0.5, "--text", text_file)
    assert command("calibrate", model, *arguments, *SMALL)[0] == 0
    monkeypatch.setenv("EIGEN_CACHE", str(tmp_path / "other-cache"))
    status, _, error = command("evaluate", output, "--text", text_file)
    assert status == 1
    assert "pass --base" in error
    status, out, _ = command("evaluate", output, "--text", text_file, "--base", model)
    assert status == 0
    assert "perplexity" in out
    status, _, error = command("evaluate", tmp_path / "nothing", "--text", text_file)
    assert status == 1
    assert "cannot read" in error
