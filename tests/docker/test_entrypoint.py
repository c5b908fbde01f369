"""The images' entry point and health check, run as processes as a container would.

Most cases run over `mock_command.py`; one goes all the way, with the shipped model.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.process import free_port
from vllm_eigen.vllm_version import vllm_version

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
        *("serve", str(checkpoint), "--served-model-name", "someone/some-model"),
        *("--host", "127.0.0.1", "--port", str(container.port)),
        *("--kv-cache-memory-bytes", str(2 << 30), "--max-model-len", "512", "--seed", "1"),
    ]


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
    assert call["argv"][:4] == ["serve", str(expected), "--served-model-name", "model"]


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


def test_the_shipped_model_is_compressed_served_and_stopped(container: Container) -> None:
    if vllm_version() is None:
        pytest.skip("vLLM is not installed")
    text = container.folder / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text() + (ROOT / "README.md").read_text())
    container.environment |= {
        "EIGEN_MODEL": str(ROOT / "demo" / "model"),
        "EIGEN_TEXT": str(text),
        "EIGEN_CALIBRATE_FLAGS": "--samples 4 --seq-len 128",
        "EIGEN_POOL": "8MiB",
        "EIGEN_SERVE_FLAGS": "--enforce-eager --max-model-len 256",
        "VLLM_API_KEY": "sk-container",
        "VLLM_EIGEN_KERNELS": "reference",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with container.running(real=True) as process:
        container.wait_healthy(process, 300.0)
        (checkpoint,) = container.checkpoints()
        cache = ask(container, "/v1/kv_cache")
        assert cache["kv_ratio"] == pytest.approx(0.6, abs=0.01)
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
