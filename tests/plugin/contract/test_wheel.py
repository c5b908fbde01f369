# SPDX-License-Identifier: Apache-2.0
"""Ranges of a remote wheel are read, bounded, and nothing but Python files."""

from __future__ import annotations

import io
import re
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.plugin.contract import wheel
from vllm_eigen.common.errors import InputError

pytestmark = pytest.mark.unit


def _wheel() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("vllm/__init__.py", "one = 1")
        archive.writestr("vllm/_C.abi3.so", bytes(5 * wheel.CHUNK_BYTES))
        archive.writestr("vllm/v1/two.py", "two = 2\n" * 200_000)
        archive.writestr("vllm-1.0.dist-info/METADATA", "Name: vllm\nVersion: 1.0\n")
    return made.getvalue()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, int]]:
    """Bytes sent so far; with `ranges` 0 the server ignores them."""
    content = _wheel()
    state = {"sent": 0, "ranges": 1}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            begin, end = map(int, re.findall(r"\d+", self.headers["Range"]))
            body = content[begin : end + 1] if state["ranges"] else content
            self.send_response(206 if state["ranges"] else 200)
            if state["ranges"]:
                self.send_header("Content-Range", f"bytes {begin}-{end}/{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            state["sent"] += len(body)
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that has seen enough goes away."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/vllm.whl"
    monkeypatch.setenv("EIGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(wheel, "_wheel_url", lambda version: url)
    yield state
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_python_files_alone(served: dict[str, int]) -> None:
    folder = wheel.python_files("1.0")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"vllm/__init__.py", "vllm/v1/two.py", "vllm-1.0.dist-info/METADATA"}
    assert (folder / "vllm/v1/two.py").read_text() == "two = 2\n" * 200_000
    sent = served["sent"]
    assert 0 < sent < 6 * wheel.CHUNK_BYTES
    assert wheel.python_files("1.0") == folder
    assert served["sent"] == sent


def test_a_server_without_ranges(served: dict[str, int]) -> None:
    served["ranges"] = 0
    with pytest.raises(InputError, match="no ranges"):
        wheel.python_files("1.0")


def test_bytes_are_bounded(served: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "MAX_BYTES", wheel.CHUNK_BYTES)
    with pytest.raises(InputError, match="would be read"):
        wheel.python_files("1.0")
    assert not [path for path in wheel.cache_folder().glob("vllm-python/*") if path.is_dir()]
