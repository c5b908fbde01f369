# SPDX-License-Identifier: Apache-2.0
"""What a machine lacks is named before the engine starts, and by `vllm-eigen doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from vllm_eigen import cli
from vllm_eigen.common.errors import InstallError
from vllm_eigen.server.launch import environment
from vllm_eigen.server.launch.environment import check_server_environment

pytestmark = pytest.mark.unit


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without compiler and Python's headers."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))


@pytest.mark.usefixtures("bare")
def test_compiler_and_headers_are_named(tmp_path: Path) -> None:
    check_server_environment(compiles=False)
    with pytest.raises(InstallError, match=r"apt install g\+\+"):
        check_server_environment(compiles=True)
    (tmp_path / "g++").touch(mode=0o755)
    with pytest.raises(InstallError, match=r"Python.h.*apt install python3\.\d+-dev"):
        check_server_environment(compiles=True)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    check_server_environment(compiles=True)


def test_libnuma_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_libnuma", lambda: False)
    monkeypatch.setattr(environment, "version_of", lambda name: "0.32.0")
    with pytest.raises(InstallError, match="apt install libnuma1"):
        check_server_environment(compiles=False)
    monkeypatch.setattr(environment, "version_of", lambda name: None)
    check_server_environment(compiles=False)


@pytest.mark.usefixtures("bare")
def test_serve_says_so_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_eigen.server.commands.serve.check_vllm_version", lambda: "0.32.0")
    monkeypatch.setattr("vllm_eigen.server.commands.serve.check_torchvision", lambda: None)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert cli.main(["serve", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "apt install g++" in error


@pytest.mark.usefixtures("bare")
def test_doctor_lists_findings_with_their_fixes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_eigen.server.launch.doctor.check_torchvision", _broken)
    monkeypatch.setattr(
        "vllm_eigen.server.launch.doctor.find_spec", lambda name: None if name == "gguf" else name
    )
    monkeypatch.setenv("EIGEN_CACHE", str(tmp_path))
    assert cli.main(["doctor", "--json"]) == 1
    found = {item["what"]: item for item in json.loads(capsys.readouterr().out)}
    assert found["torchvision"]["state"] == "wrong"
    assert found["torchvision"]["fix"] == "pip uninstall -y torchvision"
    assert found["C++ compiler"]["fix"] == "apt install g++"
    assert found["Python headers"]["state"] == "absent"
    assert "vllm-eigen[calibrate]" in found["gguf"]["fix"]
    assert found["torch"]["state"] == "ok"
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "wrong   torchvision" in text
    assert "fix: apt install g++" in text


def test_doctor_finds_nothing_wrong_where_nothing_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_eigen.server.launch.doctor.find_spec", lambda name: None)
    monkeypatch.setattr("vllm_eigen.server.launch.doctor.check_vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(environment, "has_libnuma", lambda: True)
    monkeypatch.setenv("EIGEN_CACHE", str(tmp_path / "a" / "b"))
    monkeypatch.setenv("PATH", os.defpath)
    assert cli.main(["doctor"]) == 0
    assert "wrong" not in capsys.readouterr().out


def test_doctor_runs_in_a_base_installation() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'transformers', 'huggingface_hub', 'fastapi'):\n"
        "    sys.modules[name] = None\n"
        "from vllm_eigen import cli\n"
        "cli.main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "absent  torch            not installed" in done.stdout
    assert "vllm-eigen[calibrate]" in done.stdout


def _broken() -> None:
    raise InstallError("torchvision 1 does not work; run: pip uninstall -y torchvision")
