# SPDX-License-Identifier: Apache-2.0
"""What `vllm-eigen serve` says before the engine starts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import served_model
from vllm_eigen import cli
from vllm_eigen.common.errors import EigenError, UsageError
from vllm_eigen.server.commands.serve import plugin_names
from vllm_eigen.server.launch.checks import (
    check_model,
    check_pool,
    check_port,
    check_tls,
    root_path,
)


def test_no_model_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve"]) == 2
    assert "name a model" in capsys.readouterr().err
    assert cli.main(["serve", "--help"]) == 0
    assert "--api-server-count" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_unusable_folder(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    if text is not None:
        folder.mkdir()
        (folder / "config.json").write_text(text)
    assert cli.main(["serve", str(folder)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("vllm-eigen serve: ")
    assert "\n" not in error


def test_damaged_checkpoint(tmp_path: Path) -> None:
    config = {"architectures": ["EigenLlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EigenError, match="eigen"):
        check_model(str(tmp_path))


def test_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="choose another with --port"):
            check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError):
        check_port("127.0.0.1", 70000)
    with pytest.raises(UsageError):
        check_port("203.0.113.7", 0)
    check_port("127.0.0.1", 0)
    check_port(None, 0)


def test_pool_too_small_for_one_sequence(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds 100 tokens"):
        check_pool(str(checkpoint), 100 * served_model.BYTES_PER_TOKEN, 1024, "auto")
    check_pool(str(checkpoint), 1024 * served_model.BYTES_PER_TOKEN, 1024, "auto")
    check_pool(str(checkpoint), None, 1024, "auto")
    (tmp_path / "config.json").write_text('{"architectures": ["Unknown"]}')
    check_pool(str(tmp_path), 1, 1024, "auto")


def test_tls(tmp_path: Path) -> None:
    check_tls(None, None)
    (tmp_path / "cert.pem").write_text("no certificate")
    certificate = str(tmp_path / "cert.pem")
    for pair in ((certificate, None), (certificate, str(tmp_path / "none")), (certificate,) * 2):
        with pytest.raises(UsageError, match="--ssl"):
            check_tls(*pair)


def test_root_path() -> None:
    assert root_path("/a/b/") == "/a/b"
    assert root_path("") == ""
    with pytest.raises(UsageError):
        root_path("a")


def test_entry_points_load_beside_modules_of_other_names(decoy_folder: Path) -> None:
    """As vLLM loads them where it is started with `python -m` in a user's folder."""
    code = """
from importlib.metadata import entry_points
for group in ("vllm.general_plugins", "vllm.endpoint_plugins", "vllm_eigen.commands"):
    ours = [entry for entry in entry_points(group=group) if "vllm_eigen" in entry.value]
    print(group, [entry.load() for entry in ours])
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=decoy_folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "KVCacheEndpoints" in found.stdout


def test_plugin_names_keep_what_is_named() -> None:
    assert plugin_names("other") == ["other", "eigen", "eigen_kv_cache"]
    assert {"eigen", "eigen_kv_cache"} <= set(plugin_names(None))
