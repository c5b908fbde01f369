# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ run on a small model, and stay short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests import small_llama

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ANSWERS = {
    "/v1/models": {"data": [{"id": "eigen"}]},
    "/v1/completions": {"choices": [{"text": " the array"}]},
    "/v1/kv_cache": {"bytes_per_token": 1228, "tokens": {"capacity": 27264, "used": 0}},
}


def _run(name: str, *arguments: str) -> str:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "eigen"
    size = ("--samples", "8", "--length", "128")
    shown = _run(
        "calibrate.py",
        str(small_llama.write(folder.with_name("model"))),
        str(folder),
        str(ROOT / "LICENSE"),
        *size,
    )
    assert "KV ratio 0.2" in shown
    assert shown.count(": keys ") == 4
    return folder


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_three_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["calibrate", "query_server", "serve_offline"]


@pytest.mark.slow
def test_calibrate_and_serve_offline(checkpoint: Path) -> None:
    shown = _run(
        "serve_offline.py", str(checkpoint), "Return a new", "--max-tokens", "4", "--eager"
    )
    assert "'Return a new' -> '" in shown


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.command == "POST":
            self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps(ANSWERS[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - named by the base class

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_query_server(url: str) -> None:
    shown = _run("query_server.py", "Return a new", "--url", url)
    assert shown == " the array\nKV bytes a token: 1,228\ntokens the pool holds: 27,264\n"
