# SPDX-License-Identifier: Apache-2.0
"""README's commands with the installed wheel: no compiler, an empty cache, another folder.

With README_COMPILER=1 there is a compiler, and the server compiles its model; that takes minutes.
With README_SMOLLM2=1 the model is SmolLM2-135M-Instruct, as the demo fetches it.

Its bash blocks are parsed and run. Substitutions, and nothing else:

- the hub model is a small random one here, and `held-out.txt` a text file;
- `calibrate` reads a local text in few, short windows; `evaluate` reads one window;
- `serve` gets a small pool, does not compile without a compiler, and listens on a free port, which
  `curl` asks too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import small_llama
from tests.docs.test_readme import LINES, README, ROOT
from tests.packaging.conftest import Installed, plain_environment, run

pytestmark = pytest.mark.deploy

HUB_MODEL = "meta-llama/Llama-3.1-8B"
COMPILER = os.environ.get("README_COMPILER") == "1"
SMOLLM2 = os.environ.get("README_SMOLLM2") == "1"
EAGER = [] if COMPILER else ["--enforce-eager"]
EXTRA = {
    "calibrate": ["--text", "train.txt", "--samples", "8", "--seq-len", "128"],
    "evaluate": ["--max-tokens", "2048"],
    "serve": ["--kv-cache-memory-bytes", "16777216", "--max-model-len", "256", *EAGER],
}
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
STARTUP_SECONDS = 1200.0 if COMPILER else 240.0


class Machine:
    """A folder with the texts, a free port, and an environment, without a compiler or with one."""

    def __init__(self, installed: Installed, folder: Path) -> None:
        self.installed, self.folder = installed, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        # What vLLM itself calls: uname and the like, but neither compilers nor linkers.
        tools = folder / "tools"
        tools.mkdir()
        for name in ("sh", "uname", "lscpu", "numactl"):
            for place in ("/bin", "/usr/bin"):
                if Path(place, name).exists() and not (tools / name).exists():
                    (tools / name).symlink_to(Path(place, name))
        self.environment = {
            **plain_environment(),
            "PATH": os.pathsep.join(
                (str(installed.python.parent), os.environ["PATH"] if COMPILER else str(tools))
            ),
            "EIGEN_CACHE": str(folder / "cache"),
            "VLLM_CACHE_ROOT": str(folder / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def command(self, words: list[str]) -> list[str]:
        """A `vllm-eigen` line with the substitutions above."""
        replaced = {HUB_MODEL: "model", "8000": self.port}
        words = [replaced.get(word, word) for word in words]
        return [self.installed.script, *words[1:], *EXTRA.get(words[1], [])]


@pytest.fixture(scope="module")
def machine(
    installed: Installed, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Machine:
    folder = tmp_path_factory.mktemp("readme")
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (folder / "train.txt").write_text(licence + README, encoding="utf-8")
    (folder / "held-out.txt").write_text(licence, encoding="utf-8")
    if SMOLLM2:
        (folder / "model").symlink_to(request.getfixturevalue("smollm2"))
    else:
        small_llama.write(folder / "model")
        (folder / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return Machine(installed, folder)


@pytest.mark.slow
def test_commands_run(machine: Machine) -> None:
    commands = [words for words in LINES if words[0] == "vllm-eigen" and words[1] != "serve"]
    assert [words[1] for words in commands] == ["doctor", "calibrate", "evaluate"]
    said = [run(machine.command(words), machine.folder, machine.environment) for words in commands]
    assert re.search(r"(ok|absent) +C\+\+ compiler", said[0])[1] == ("ok" if COMPILER else "absent")
    assert re.search(r"CPU kernels +\w+, built", said[0])
    assert (machine.folder / "llama-eigen" / "config.json").is_file()


@pytest.fixture
def server(machine: Machine) -> Iterator[subprocess.Popen[bytes]]:
    (words,) = [words for words in LINES if words[:2] == ["vllm-eigen", "serve"]]
    with (machine.folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            machine.command(words),
            cwd=machine.folder,
            env=machine.environment,
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
def test_server_answers(server: subprocess.Popen[bytes], machine: Machine) -> None:
    (words,) = [words for words in LINES if words[0] == "curl"]
    url = "http://" + words[1].replace("8000", machine.port)
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        log = (machine.folder / "serve.log").read_text(encoding="utf-8")
        assert server.poll() is None, log[-2000:]
        assert time.monotonic() < deadline, "the server did not start"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert b"bytes_per_token" in answer.read()
                break
        except OSError:
            time.sleep(1)
    body = {"messages": [{"role": "user", "content": "Return a new"}], "max_tokens": 5}
    request = urllib.request.Request(
        f"{machine.url}/v1/chat/completions",
        data=json.dumps(body | {"ignore_eos": True}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 5
    # The kernels of the wheel were in use: none was compiled.
    assert not list((machine.folder / "cache").glob("kernels-*"))
    caches = [machine.folder / name for name in ("vllm", "inductor")]
    assert any(list(cache.rglob("*.so")) for cache in caches) == COMPILER
