# SPDX-License-Identifier: Apache-2.0
"""The commands of README.md work: its bash blocks are parsed and run.

Substitutions, and nothing else:

- the hub model is a small random one, `held-out.txt` a text file here;
- `calibrate` reads a local text in few, short windows; `evaluate` reads one window;
- `serve` gets a small pool, does not compile, and listens on a free port, which `curl` asks too;
- `make` and `pip install` would build an environment: their targets and extras must exist.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import small_llama

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    words
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if (words := shlex.split(line, comments=True))
]
HUB_MODEL = "meta-llama/Llama-3.1-8B"
EXTRA = {
    "calibrate": ["--text", "train.txt", "--samples", "8", "--seq-len", "128"],
    "evaluate": ["--max-tokens", "2048"],
    "serve": ["--kv-cache-memory-bytes", "16777216", "--enforce-eager", "--max-model-len", "256"],
}
STARTUP_SECONDS = 240.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run, with the texts that they read."""
    made = tmp_path_factory.mktemp("readme")
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (made / "train.txt").write_text(licence + README, encoding="utf-8")
    (made / "held-out.txt").write_text(licence, encoding="utf-8")
    small_llama.write(made / "model")
    return made


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _command(words: list[str], port: int) -> list[str]:
    """A `vllm-eigen` line with the substitutions above."""
    replaced = {HUB_MODEL: "model", "8000": str(port)}
    words = [replaced.get(word, word) for word in words]
    return [sys.executable, "-m", "vllm_eigen.cli", *words[1:], *EXTRA.get(words[1], [])]


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def test_every_line_is_known() -> None:
    assert {words[0] for words in LINES} == {"make", "pip", "vllm-eigen", "curl"}


@pytest.mark.parametrize("target", [words[1] for words in LINES if words[0] == "make"])
def test_make_targets_exist(target: str) -> None:
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"\.\[([\w,]+)\]", README)
    assert named
    extras = {extra for group in named for extra in group.split(",")}
    assert extras <= set(project["optional-dependencies"])


@pytest.mark.slow
def test_commands_run(folder: Path, port: int) -> None:
    commands = [words for words in LINES if words[0] == "vllm-eigen" and words[1] != "serve"]
    assert [words[1] for words in commands] == ["doctor", "calibrate", "evaluate"]
    for words in commands:
        done = subprocess.run(
            _command(words, port),
            cwd=folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert (folder / "llama-eigen" / "config.json").is_file()


@pytest.fixture
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    (words,) = [words for words in LINES if words[:2] == ["vllm-eigen", "serve"]]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            _command(words, port),
            cwd=folder,
            env=_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_server_answers(server: subprocess.Popen[bytes], folder: Path, port: int) -> None:
    (words,) = [words for words in LINES if words[0] == "curl"]
    url = "http://" + words[1].replace("8000", str(port))
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        assert server.poll() is None, (folder / "serve.log").read_text(encoding="utf-8")[-2000:]
        assert time.monotonic() < deadline, "the server did not start"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert b"bytes_per_token" in answer.read()
                break
        except OSError:
            time.sleep(1)
