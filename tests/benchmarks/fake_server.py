# SPDX-License-Identifier: Apache-2.0
"""A server that answers like `vllm-eigen serve`, without an engine, and can misbehave on purpose.

It holds at most `slots` sequences, queues the rest, and takes `delay` seconds a token, so that a
load on it has known results.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BLOCK = 16
MAX_MODEL_LEN = 1024


@dataclass
class Fake:
    """The server's state; the flags below make it misbehave."""

    slots: int = 4
    delay: float = 0.002
    bytes_per_token: int = 100
    logprob: float = -1.0
    fail_every: int = 0
    """Every so many completions end in status 500."""
    leak: int = 0
    """Blocks in use though nothing runs."""
    drift_after: int = 0
    """After so many completions, greedy answers are others."""
    lenient: bool = False
    """Malformed requests are answered with status 200."""
    likelihoods: Callable[[list[int]], list[float]] | None = None
    """Log-probabilities of a prompt's tokens after the first; `logprob` each by default."""
    url: str = ""
    completions: int = 0
    running: int = 0
    waiting: int = 0
    generated: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.gate = threading.Semaphore(self.slots)

    def kv_cache(self) -> dict[str, Any]:
        used = self.running + self.leak
        capacity = self.slots * 8 * BLOCK
        return {
            "pool_bytes": capacity * self.bytes_per_token, "bytes_per_token": self.bytes_per_token,
            "blocks": {"total": self.slots * 8, "used": used},
            "tokens": {"capacity": capacity, "used": used * BLOCK},
            "requests": {"running": self.running, "waiting": self.waiting, "preemptions": 3},
            "max_model_len": MAX_MODEL_LEN,
        }  # fmt: skip

    def metrics(self) -> str:
        return (
            "# HELP vllm:generation_tokens_total Tokens.\n"
            "# TYPE vllm:generation_tokens_total counter\n"
            f'vllm:generation_tokens_total{{engine="0"}} {self.generated}.0\n'
            "# HELP vllm:e2e_request_latency_seconds Latency.\n"
            "# TYPE vllm:e2e_request_latency_seconds histogram\n"
            'vllm:e2e_request_latency_seconds_bucket{le="0.3"} 1.0\n'
        )

    def answer(self, tokens: int) -> list[int]:
        shift = bool(self.drift_after) and self.completions > self.drift_after
        return [7 + shift] * tokens


@contextlib.contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """Run the server on 127.0.0.1 while the block lasts."""

    class Handler(_Handler):
        state = fake

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Fake
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._send(200, self.state.metrics().encode())
        elif self.path == "/v1/kv_cache":
            self._json(200, self.state.kv_cache())
        elif self.path == "/v1/models":
            self._json(200, {"data": [{"id": "fake", "max_model_len": MAX_MODEL_LEN}]})
        else:
            self._json(404, {"error": "no such route"})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/completions":
            self._json(404, {"error": "no such route"})
            return
        try:
            body = json.loads(raw)
            good = body["model"] == "fake" and body.get("n", 1) > 0
            good = good and 0 <= int(body.get("max_tokens", 1)) < MAX_MODEL_LEN
            good = good and not isinstance(body.get("temperature"), str)
            good = good and len(body["prompt"]) < MAX_MODEL_LEN
            if isinstance(body["prompt"], list) and isinstance(body["prompt"][0], int):
                good = good and max(body["prompt"]) < 2**30
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            self._json(200 if self.state.lenient else 400, {"error": "malformed"})
            return
        with self.state.lock:
            self.state.completions += 1
            number = self.state.completions
            self.state.waiting += 1
        with self.state.gate:
            with self.state.lock:
                self.state.waiting -= 1
                self.state.running += 1
            try:
                if self.state.fail_every and number % self.state.fail_every == 0:
                    self._json(500, {"error": "on purpose"})
                else:
                    self._complete(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with self.state.lock:
                    self.state.running -= 1

    def _complete(self, body: dict[str, Any]) -> None:
        tokens = int(body.get("max_tokens", 16))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}
        if not body.get("stream"):
            time.sleep(self.state.delay * tokens)
            self.state.generated += tokens
            # As OpenAI's API: several prompts in one request, or one.
            several = isinstance(body["prompt"], list) and isinstance(body["prompt"][0], list)
            prompts = body["prompt"] if several else [body["prompt"]]
            choices = [self._choice(body, p, tokens, i) for i, p in enumerate(prompts)]
            self._json(200, {"choices": choices, "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(tokens):
            time.sleep(self.state.delay)
            self.state.generated += 1
            self._event({"choices": [{"text": "x"}]})
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _choice(
        self, body: dict[str, Any], prompt: list[int], tokens: int, index: int
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"text": "x", "token_ids": self.state.answer(tokens)}
        choice["index"] = index
        if body.get("logprobs"):
            made = [self.state.logprob] * tokens
            if body.get("echo"):
                known = [self.state.logprob] * (len(prompt) - 1)
                if self.state.likelihoods is not None:
                    known = self.state.likelihoods(prompt)
                made = [None, *known, *made]  # type: ignore[list-item]
            choice["logprobs"] = {
                "token_logprobs": made,
                "top_logprobs": [{"x": -0.1, "y": -3.0}] * len(made),
            }
        return choice

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, status: int, data: dict[str, Any]) -> None:
        self._send(status, json.dumps(data).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
