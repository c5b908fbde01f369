# SPDX-License-Identifier: Apache-2.0
"""The plugin runs on the Python files of supported releases that are not installed.

Their compiled files are the installed release's. The plugin registers, its layers make their
KV-cache specifications, vLLM plans the cache, and an engine answers as the reference does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin.contract.release import overlay
from tests.plugin.contract.test_contract import TESTED
from tests.plugin.harness.engine import LOGIT_LIMIT
from vllm_eigen.common.errors import InputError
from vllm_eigen.plugin.vllm_version import SUPPORTED, minor_version, supported_range, vllm_version

ROOT = Path(__file__).parents[3]
SECONDS = 1100
INSTALLED = minor_version(vllm_version() or "")


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("version", [v for v in TESTED if minor_version(v) != INSTALLED])
def test_engine(version: str, tmp_path: Path) -> None:
    try:
        files = overlay(version, tmp_path / "overlay")
    except InputError as error:
        pytest.skip(str(error))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{files}{os.pathsep}{ROOT}",
        "VLLM_TARGET_DEVICE": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugin.contract.trial"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["version"], found["checked"]) == (version, version)
    assert found["registered"]
    assert found["flags"] == {"model_tag": "model", "kv_cache_dtype": "fp8", "port": 81}
    assert found["pages"] == found["wanted_pages"]
    assert len(set(found["pages"])) == len(found["pages"]) > 1
    assert found["capacity"] == found["wanted_capacity"]
    assert found["error"] < LOGIT_LIMIT


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.32.0", "0.3.2", "0.34.0rc1+cpu"])
def test_another_release_is_refused_in_one_line(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_eigen.common.errors import EngineError
    from vllm_eigen.plugin import register, vllm_version

    logged: list[tuple[object, ...]] = []
    monkeypatch.setattr(vllm_version, "version", lambda name: version)
    with pytest.raises(EngineError) as refused:
        vllm_version.own_module()
    told = f"vLLM {version} is not supported (supported: >=0.32,<0.34); install a supported version"
    assert str(refused.value) == told

    class Logger:
        def error(self, *arguments: object) -> None:
            logged.append(arguments)

    monkeypatch.setattr("vllm.logger.init_logger", lambda name: Logger())
    monkeypatch.setattr(register, "FAMILIES", None)  # would fail if anything were registered
    register.register()
    [(form, reason)] = logged
    assert (form, str(reason)) == ("vllm-eigen is switched off: %s", told)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.9+cpu", "0.33.0", "0.33.1.dev3", "0.33.0rc2"])
def test_patch_releases_are_supported(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_eigen.plugin import vllm_version

    monkeypatch.setattr(vllm_version, "version", lambda name: version)
    assert vllm_version.check_vllm_version() == version
    assert minor_version(version) in SUPPORTED
    assert supported_range() == ">=0.32,<0.34"
