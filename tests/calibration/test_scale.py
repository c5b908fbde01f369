# SPDX-License-Identifier: Apache-2.0
"""Peak memory, memory-mapped activations and the dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calibration.tiny import build_model, save_model
from vllm_eigen.calibration.export.tensorfile import TensorFile
from vllm_eigen.calibration.model.activations import allocate
from vllm_eigen.common.errors import OutputError

Command = Callable[..., tuple[int, str, str]]

PEAK = """
import argparse, re, sys
from vllm_eigen.calibration.commands import calibrate
parser = argparse.ArgumentParser()
calibrate.add_arguments(parser)
arguments = parser.parse_args(sys.argv[1:])
import torch
torch.set_num_threads(1)
assert calibrate.run(arguments) == 0
# Not ru_maxrss: that of a child starts from its parent's.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.slow
def test_peak_memory_grows_with_a_layer_not_with_the_model(tmp_path: Path, text_file: Path) -> None:
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 12}
    shape["num_key_value_heads"] = 4
    peaks, sizes = [], []
    for layers in (4, 24):
        model = build_model("llama", num_hidden_layers=layers, **shape)
        folder = save_model(model, tmp_path / f"m{layers}")
        size = sum(p.nbytes for p in model.model.layers.parameters())
        arguments = ("--output", tmp_path / f"o{layers}", "--kv-ratio", "0.6", "--text", text_file)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                PEAK,
                str(folder),
                *map(str, arguments),
                "--samples",
                "4",
                "--seq-len",
                "24",
                "--method",
                "paper",
                "--quiet",
            ],
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        peaks.append(int(done.stdout))
        sizes.append(size)
    # The pages of libraries that the system has mapped vary by tens of megabytes.
    assert sizes[1] - sizes[0] > 120e6
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 3


def test_activations_past_the_limit_are_mapped(tmp_path: Path) -> None:
    mapped = allocate((3, 4, 5), limit=0, folder=tmp_path)
    mapped[1] = 7
    assert float(mapped.sum()) == 7 * 20
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(OutputError, match="No space left"):
        allocate((3, 4), limit=0, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_writing_leaves_nothing(
    make_model: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    before = sorted(tmp_path.iterdir())
    calls = iter(range(100))

    def add(*_: Any) -> None:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFile, "add", add)
    monkeypatch.setattr(TensorFile, "size", 0, raising=False)
    arguments = ("--output", tmp_path / "out", "--kv-ratio", 0.6, "--text", text_file)
    status, _, error = command("calibrate", model, *arguments, "--seq-len", 24)
    assert status == 1
    assert "No space left" in error
    assert sorted(tmp_path.iterdir()) == before


def test_streamed_files_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 5),
        "b": torch.randn(2, 2, 2).bfloat16(),
        "c": torch.arange(7),
        "d": torch.tensor(True),
        "e": torch.empty(0, 3, dtype=torch.float16),
    }
    with TensorFile(tmp_path / "x", list(tensors)) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
    loaded = load_file(tmp_path / "x")
    assert {name: item.dtype for name, item in loaded.items()} == {
        name: item.dtype for name, item in tensors.items()
    }
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    save_file(loaded, tmp_path / "y")


def test_shards_out(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from tests.calibration.model.test_fold import folded, random_bases
    from vllm_eigen.calibration.export.write import write_checkpoint
    from vllm_eigen.calibration.methods.basis import LayerBases
    from vllm_eigen.calibration.model.compressed import load_reference
    from vllm_eigen.calibration.model.source import open_source
    from vllm_eigen.checkpoint.config import read_config
    from vllm_eigen.checkpoint.validate import validate

    model = make_model()
    one, _ = folded(model, tmp_path / "one", [(3, 5), (7, 2)])
    source = open_source(str(model))
    bases = [LayerBases(random_bases(2, 8, 2 * n), random_bases(2, 8, 2 * n + 1)) for n in range(2)]
    eigen = read_config(one)[1]
    write_checkpoint(source, eigen, bases, tmp_path / "many", shard_bytes=9000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert validate(tmp_path / "many") == eigen
    tokens = torch.randint(3, 60, (1, 9))
    left, right = (load_reference(folder)(tokens).logits for folder in (one, tmp_path / "many"))
    assert torch.equal(left, right)


def test_dry_run_needs_no_weights(
    make_model: Callable[..., Path], tmp_path: Path, command: Command
) -> None:
    model = make_model("mpt")
    (model / "model.safetensors").unlink()
    for method in ("paper", "sensitivity", "coded"):
        arguments = ("--output", tmp_path / "out", "--kv-ratio", 0.5, "--dry-run")
        status, out, error = command("calibrate", model, *arguments, "--method", method)
        assert status == 0, error
        lines = dict(line.split(None, 1) for line in out.splitlines() if line)
        assert "0.5000" in lines["KV"]
        # Codes are compared with 16 bits, other latents with the model's element type.
        assert lines["bytes"].endswith("128 of 256" if method == "coded" else "256 of 512")
        assert {"peak", "disk", "time", "tokens"} <= set(lines)
    assert not (tmp_path / "out").exists()
    status, out, _ = command(
        "calibrate", model, *arguments[:2], "--error-budget", 0.1, "--dry-run", "--method", "paper"
    )
    assert status == 0
    assert "as the error budget decides" in out


def test_inspect(
    make_model: Callable[..., Path], tmp_path: Path, command: Command, text_file: Path
) -> None:
    from tests.calibration.model.test_fold import folded

    output, _ = folded(make_model(), tmp_path / "eigen", [(3, 5), (7, 2)])
    config = json.loads((output / "config.json").read_text())
    config["eigen"]["layers"][1] |= {"k_scale": 0.0312512345, "v_scale": 1.5e-9}
    (output / "config.json").write_text(json.dumps(config))
    status, out, _ = command("inspect", output)
    assert status == 0
    assert out.splitlines()[-1].split() == ["1", "7", "2", "0.562", "0.03125", "1.5e-09"]
    assert max(len(line) for line in out.splitlines()) <= 60
    status, out, _ = command("inspect", output, "--json")
    summary = json.loads(out)
    assert summary["layers"][1]["rank_k"] == 7
    assert summary["layers"][1]["k_scale"] == 0.0312512345
    assert summary["bytes_per_token"] == 2 * (3 + 5 + 7 + 2) * 4
    assert command("inspect", tmp_path)[0] == 1
