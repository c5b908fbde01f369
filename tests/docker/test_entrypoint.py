# SPDX-License-Identifier: Apache-2.0
"""The images' entry point and health check, run as processes as a container would.

Most cases run over `mock_command.py`; one goes all the way, with a small model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import certifi
import pytest

from tests import small_llama
from tests.docker.mock_command import Handler
from vllm_eigen.plugin.vllm_version import vllm_version
from vllm_eigen.server.launch.process import free_port

ROOT = Path(__file__).resolve().parents[2]
ENTRYPOINT = ROOT / "docker" / "entrypoint.py"
HEALTH = ROOT / "docker" / "health.py"
MOCKED = f"""
import sys
sys.path.insert(0, {str(ENTRYPOINT.parent)!r})
import entrypoint
entrypoint.COMMAND = (sys.executable, {str(Path(__file__).with_name("mock_command.py"))!r})
sys.exit(entrypoint.main(sys.argv[1:]))
"""
SECONDS = 30.0


class Container:
    """A place to start the entry point in, again and again, as a restarted container does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("EIGEN_")},
            "EIGEN_MODEL": "someone/some-model",
            "EIGEN_CHECKPOINTS": str(folder / "checkpoints"),
            "EIGEN_HOST": "127.0.0.1",
            "EIGEN_PORT": str(self.port),
            "MOCK_LOG": str(folder / "calls"),
            "HF_HUB_OFFLINE": "1",
        }
        self.error = folder / "stderr"

    @contextlib.contextmanager
    def running(self, *arguments: str, real: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """The entry point, started; whatever is left of it is killed at the end."""
        start = [str(ENTRYPOINT)] if real else ["-c", MOCKED]
        with self.error.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, *start, *arguments],
                env=self.environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(SECONDS)

    def run(self, *arguments: str, real: bool = False) -> int:
        """Start it and wait for its end; returns the exit status."""
        with self.running(*arguments, real=real) as process:
            return process.wait(SECONDS)

    def healthy(self) -> bool:
        """What the image's health check says."""
        done = subprocess.run(
            [sys.executable, HEALTH], env=self.environment, capture_output=True, timeout=SECONDS
        )
        assert done.returncode in (0, 1)
        return done.returncode == 0

    def wait_healthy(self, process: subprocess.Popen[bytes], seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.healthy():
            assert process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)

    def calls(self) -> list[dict[str, Any]]:
        """What the mocked commands were asked for, in order."""
        log = Path(self.environment["MOCK_LOG"])
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def said(self) -> str:
        return self.error.read_text(errors="replace")

    def checkpoints(self) -> list[Path]:
        """Finished ones."""
        return sorted(Path(self.environment["EIGEN_CHECKPOINTS"]).glob("[!.]*"))


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


def test_calibrates_once_then_serves_until_sigterm(container: Container) -> None:
    container.environment |= {
        "EIGEN_KV_RATIO": "0.5",
        "EIGEN_POOL": "2 GiB",
        "EIGEN_CALIBRATE_FLAGS": "--samples 8 --method 'paper'",
        "EIGEN_SERVE_FLAGS": "--max-model-len 512",
    }
    assert not container.healthy()
    for start in (1, 2):
        with container.running("--seed", "1") as process:
            container.wait_healthy(process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0
        assert [call["argv"][0] for call in container.calls()] == ["calibrate"] + ["serve"] * start
        # The server takes the entry point's place: signals need nobody to pass them on.
        assert container.calls()[-1]["pid"] == process.pid
    (checkpoint,) = container.checkpoints()
    assert checkpoint.name.startswith("some-model-kv0.5-")
    calibrate, serve, _ = (call["argv"] for call in container.calls())
    assert calibrate == [
        *("calibrate", "someone/some-model", "--output", str(checkpoint), "--resume"),
        *("--kv-ratio", "0.5", "--samples", "8", "--method", "paper"),
    ]
    assert serve == [
        # Two names: metrics carry the first, which a server of the base does not have.
        *("serve", str(checkpoint), "--served-model-name", "someone/some-model-eigen"),
        "someone/some-model",
        *("--host", "127.0.0.1", "--port", str(container.port)),
        *("--kv-cache-memory-bytes", str(2 << 30), "--max-model-len", "512", "--seed", "1"),
    ]


def test_keys_come_from_files_unless_they_are_variables(container: Container) -> None:
    secrets = container.folder / "secrets"
    secrets.mkdir()
    (secrets / "api_key").write_text("sk-file\n")
    (secrets / "hf_token").symlink_to("/dev/null")  # as Compose mounts one that is not set
    container.environment |= {"EIGEN_SECRETS": str(secrets), "EIGEN_KV_RATIO": "none"}
    for name in ("VLLM_API_KEY", "HF_TOKEN"):
        container.environment.pop(name, None)
    with container.running() as process:
        container.wait_healthy(process)
    container.environment["VLLM_API_KEY"] = "sk-variable"
    with container.running() as process:
        container.wait_healthy(process)
    assert [call["environment"] for call in container.calls()] == [
        {"VLLM_API_KEY": "sk-file"},
        {"VLLM_API_KEY": "sk-variable"},
    ]
    assert "sk-" not in container.said()
    assert "sk-" not in json.dumps([call["argv"] for call in container.calls()])


def test_the_libraries_there_are_are_preloaded(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("entrypoint", ENTRYPOINT)
    assert spec is not None
    assert spec.loader is not None
    entrypoint = importlib.util.module_from_spec(spec)
    sys.modules["entrypoint"] = entrypoint  # where dataclasses look for it
    try:
        spec.loader.exec_module(entrypoint)
    finally:
        del sys.modules["entrypoint"]
    (tmp_path / "x86_64-linux-gnu").mkdir()
    there = tmp_path / "x86_64-linux-gnu" / "libtcmalloc_minimal.so.4"
    there.touch()
    patterns = (f"{tmp_path}/*-linux-gnu/libtcmalloc_minimal.so.4", f"{tmp_path}/lib/libiomp5.so")
    assert entrypoint.preloads({}, patterns) == str(there)
    assert entrypoint.preloads({"LD_PRELOAD": "mine.so"}, patterns) == "mine.so"
    assert entrypoint.preloads({}, ()) == ""


def test_whatever_shapes_a_checkpoint_makes_another_one(container: Container) -> None:
    text = container.folder / "text.txt"
    text.write_text("one")
    model = container.folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    changes = (
        {},
        {"EIGEN_KV_RATIO": "0.7"},
        {"EIGEN_CALIBRATE_FLAGS": "--samples 3"},
        {"EIGEN_TEXT": str(text)},
        {"EIGEN_MODEL": str(model)},
    )
    for number, change in enumerate(changes, 1):
        container.environment |= change
        for _ in range(2):
            assert container.run("--calibrate-only") == 0, container.said()
            assert len(container.checkpoints()) == number
    text.write_text("other")
    assert container.run("--calibrate-only") == 0
    (model / "config.json").write_text('{"changed": 1}')
    assert container.run("--calibrate-only") == 0
    assert len(container.checkpoints()) == len(changes) + 2
    assert [call["argv"][0] for call in container.calls()] == ["calibrate"] * (len(changes) + 2)
    assert "--text" in container.calls()[-1]["argv"]


def test_one_of_two_containers_calibrates_and_the_other_waits(container: Container) -> None:
    container.environment["MOCK_SECONDS"] = "1"
    with container.running("--calibrate-only") as one, container.running("--calibrate-only") as two:
        assert (one.wait(SECONDS), two.wait(SECONDS)) == (0, 0)
    assert len(container.calls()) == 1


@pytest.mark.parametrize("named", ["none", "compressed", "exact"])
def test_nothing_is_calibrated_without_need(container: Container, named: str) -> None:
    model = container.folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"eigen": {}}' if named == "compressed" else "{}")
    container.environment["EIGEN_MODEL"] = str(model)
    if named == "none":
        container.environment["EIGEN_KV_RATIO"] = "none"
    if named == "exact":
        (container.folder / "made").mkdir()
        container.environment["EIGEN_CHECKPOINT"] = str(container.folder / "made")
    with container.running() as process:
        container.wait_healthy(process)
    (call,) = container.calls()
    expected = container.folder / "made" if named == "exact" else model
    names = ["model-eigen", "model"] if named == "exact" else ["model"]
    assert call["argv"][:3] == ["serve", str(expected), "--served-model-name"]
    assert call["argv"][3 : call["argv"].index("--host")] == names


def test_the_health_check_takes_a_private_certificate(tmp_path: Path) -> None:
    """The certificate is for the name that clients ask for, signed by an authority of their own."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not installed (apt install openssl)")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=model.example.com", "-keyout", str(key), "-out", str(certificate)),
            *("-addext", "subjectAltName=DNS:model.example.com"),
        ],
        check=True,
        capture_output=True,
        timeout=SECONDS,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"https://127.0.0.1:{server.server_port}"
        assert _health(f"{address}/health") == 0
        assert _health(f"{address}/health", str(certificate)) == 0
        assert _health(f"{address}/other") == 1
        assert _health(f"{address}/health", certifi.where()) == 1
        server.shutdown()


def _health(url: str, authorities: str = "") -> int:
    environment = {**os.environ, "EIGEN_HEALTH_URL": url, "EIGEN_HEALTH_CA": authorities}
    done = subprocess.run(
        [sys.executable, HEALTH], env=environment, capture_output=True, timeout=60
    )
    return done.returncode


def test_sigterm_ends_a_calibration_and_the_next_start_takes_it_up(container: Container) -> None:
    container.environment["MOCK_SECONDS"] = "60"
    with container.running() as process:
        deadline = time.monotonic() + SECONDS
        while not container.calls() and time.monotonic() < deadline:
            time.sleep(0.05)
        (call,) = container.calls()
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(call["pid"], 0)
    assert container.checkpoints() == []
    container.environment["MOCK_SECONDS"] = "0"
    assert container.run("--calibrate-only") == 0
    assert len(container.checkpoints()) == 1
    assert "--resume" in container.calls()[-1]["argv"]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"EIGEN_MODEL": ""}, 2, "set EIGEN_MODEL"),
        ({"EIGEN_KV_RATIO": "60%"}, 2, "EIGEN_KV_RATIO=60%"),
        ({"EIGEN_KV_RATIO": "-0.5"}, 2, "is no share"),
        ({"EIGEN_POOL": "big"}, 2, "is no size"),
        ({"EIGEN_SERVE_FLAGS": "--name 'x"}, 2, "EIGEN_SERVE_FLAGS"),
        ({"EIGEN_TEXT": "/nowhere/text.txt"}, 1, "is it mounted?"),
        ({"EIGEN_CHECKPOINTS": "/dev/null/checkpoints"}, 1, "mount a volume"),
        ({"EIGEN_CALIBRATE_FLAGS": "--fail"}, 3, "calibrating"),
    ],
)
def test_mistakes_end_in_one_line(
    container: Container, change: dict[str, str], status: int, words: str
) -> None:
    container.environment |= change
    assert container.run() == status
    assert words in container.said()
    assert "Traceback" not in container.said()
    assert len(container.said().splitlines()) == 1
    assert all(call["argv"][0] != "serve" for call in container.calls())


@pytest.mark.slow
def test_a_model_is_compressed_served_and_stopped(container: Container) -> None:
    if vllm_version() is None:
        pytest.skip("vLLM is not installed")
    text = container.folder / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text() + (ROOT / "README.md").read_text())
    container.environment |= {
        "EIGEN_MODEL": str(small_llama.write(container.folder / "model")),
        "EIGEN_TEXT": str(text),
        "EIGEN_CALIBRATE_FLAGS": "--samples 4 --seq-len 128",
        "EIGEN_POOL": "8MiB",
        "EIGEN_SERVE_FLAGS": "--enforce-eager --max-model-len 256",
        "VLLM_API_KEY": "sk-container",
        "EIGEN_KERNELS": "reference",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with container.running(real=True) as process:
        container.wait_healthy(process, 300.0)
        (checkpoint,) = container.checkpoints()
        cache = ask(container, "/v1/kv_cache")
        assert 0.2 < cache["kv_ratio"] <= 0.27  # the container's own default, of coded pages
        body = {"model": "model", "prompt": "Return a new", "max_tokens": 4, "temperature": 0}
        assert ask(container, "/v1/completions", body)["choices"][0]["text"]
        with pytest.raises(urllib.error.HTTPError):
            ask(container, "/v1/models", key="wrong")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, container.said()
    assert not container.healthy()
    before = (checkpoint / "config.json").stat()
    assert container.run("--calibrate-only", real=True) == 0, container.said()
    assert container.said().splitlines() == [f"vllm-eigen: checkpoint {checkpoint}"]
    assert (checkpoint / "config.json").stat() == before


def ask(
    container: Container, path: str, body: object = None, key: str = "sk-container"
) -> dict[str, Any]:
    """The server's JSON answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{container.port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
