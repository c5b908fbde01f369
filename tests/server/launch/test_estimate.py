# SPDX-License-Identifier: Apache-2.0
"""The estimate of a checkpoint on disk, and its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoint.test_estimate import GEMMA_270M, LLAMA_8B
from tests.server import served_model
from vllm_eigen import cli
from vllm_eigen.checkpoint.estimate import estimate
from vllm_eigen.common.errors import UsageError
from vllm_eigen.server.launch.model_files import read_config, weight_bytes


def test_compressed_checkpoint_brings_its_ranks(checkpoint: Path) -> None:
    config, stored = read_config(str(checkpoint)), weight_bytes(str(checkpoint))
    assert stored is not None
    found = estimate(config, 64 << 20, block_size=128, stored_bytes=stored)
    assert found.compressed.bytes_per_token == served_model.BYTES_PER_TOKEN
    assert found.uncompressed.bytes_per_token == served_model.FULL_BYTES_PER_TOKEN
    assert found.compressed.weight_bytes == stored
    counted = estimate(config, 64 << 20, block_size=128).compressed.weight_bytes
    assert counted == pytest.approx(stored, rel=0.02)
    with pytest.raises(UsageError, match="compressed already"):
        estimate(config, 64 << 20, kv_ratio=0.5)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    command = ["estimate", str(tmp_path), "--memory", "80GiB", "--kv-ratio", "0.6"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compressed"]["tokens"] > found["uncompressed"]["tokens"]
    assert cli.main(command) == 0
    assert "KV bytes per token" in capsys.readouterr().out
    assert cli.main(["estimate", str(tmp_path / "none"), "--memory", "1GiB"]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["estimate", str(tmp_path), "--memory", "much"]) == 2


@pytest.mark.parametrize(
    ("options", "block_size", "in_flight"),
    [
        ([], 16, 4096),
        (["--no-async-scheduling"], 16, 2048),
        (["--device", "cpu"], 128, 2048),
        (["--device", "cpu", "--max-num-batched-tokens", "512", "--block-size", "32"], 32, 512),
    ],
)
def test_where_vllm_runs(
    options: list[str],
    block_size: int,
    in_flight: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_270M))
    assert cli.main(["estimate", str(tmp_path), "--memory", "4GiB", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)["compressed"]["sequences"]
    expected = estimate(GEMMA_270M, 4 << 30, in_flight=in_flight, block_size=block_size)
    assert found == expected.compressed.sequences
