# SPDX-License-Identifier: Apache-2.0
"""What is missing or broken in the environment is one line that names the fix."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vllm_eigen.common.errors import InstallError
from vllm_eigen.common.packages import extra_of

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys
for name in {missing!r}:
    sys.modules[name] = None  # as if it were not installed
from vllm_eigen import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def run(
    arguments: list[str], missing: tuple[str, ...] = (), path: Path | None = None
) -> tuple[int, str]:
    """Exit status and standard error of a command in an environment without some packages."""
    found = [str(path)] if path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*found, str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("calibrate MODEL --output OUT --text TEXT", "torch", "calibrate"),
        ("evaluate MODEL --text TEXT", "torch", "calibrate"),
        ("report MODEL --output OUT", "matplotlib", "calibrate"),
        ("estimate nobody/no-model --memory 1GiB", "huggingface_hub", "calibrate"),
    ],
)
def test_a_missing_package_names_its_extra(
    tmp_path: Path, command: str, package: str, extra: str
) -> None:
    places = {"MODEL": tmp_path, "OUT": tmp_path / "out", "TEXT": tmp_path / "text.txt"}
    words = [str(places.get(word, word)) for word in command.split()]
    status, error = run(words, missing=(package,))
    assert status == 1, error
    assert "\n" not in error
    assert package in error
    assert f"vllm-eigen[{extra}]" in error


def test_names_of_harness_tasks_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from vllm_eigen.calibration.evaluation.taskset import TaskSet

    for name in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "vllm_eigen.calibration.evaluation.harness", raising=False)
    with pytest.raises(InstallError, match=r"lm_eval.*vllm-eigen\[bench\], or pass a jsonl"):
        TaskSet(["piqa"])


def test_the_extras_named_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package in ("torch", "transformers", "datasets", "matplotlib", "huggingface_hub"):
        assert extra_of(package) == "calibrate"
    assert extra_of("lm_eval") == "bench"
    assert {"calibrate", "bench"} <= set(project["optional-dependencies"])
    assert extra_of("numpy") is None
    assert extra_of("no_such_package") is None


def test_other_missing_modules_stay_bugs() -> None:
    code = "import vllm_eigen.cli as cli\ncli._load = lambda m: __import__('no_such_module')\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "cli.main(['calibrate'])"], capture_output=True, text=True
    )
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "command", ["calibrate MODEL --output OUT --text TEXT", "evaluate MODEL", "serve MODEL"]
)
def test_a_broken_torchvision_is_named(tmp_path: Path, command: str) -> None:
    """As vLLM's CPU wheel brings it: built for CUDA, beside a PyTorch that is not."""
    pytest.importorskip("torch")
    package = tmp_path / "path" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    places = {"MODEL": tmp_path, "OUT": tmp_path / "out", "TEXT": tmp_path / "text.txt"}
    words = [str(places.get(word, word)) for word in command.split()]
    status, error = run(words, path=package.parent)
    assert status == 1
    assert "\n" not in error
    assert "torchvision::nms" in error
    assert "pip uninstall -y torchvision" in error
