# SPDX-License-Identifier: Apache-2.0
"""Stands in for `vllm-eigen`, so that the entry point can be tested as a process in a second.

`calibrate` writes a folder after MOCK_SECONDS; `serve` answers `/health` until SIGTERM. Both append
their command line to MOCK_LOG, and the variables `LOGGED`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

LOGGED = ("VLLM_API_KEY", "HF_TOKEN")


class Handler(BaseHTTPRequestHandler):
    """200 for `/health`."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def option(name: str) -> str:
    """Value of an option on the command line."""
    return sys.argv[sys.argv.index(name) + 1]


def main() -> int:
    with Path(os.environ["MOCK_LOG"]).open("a") as log:
        variables = {name: os.environ[name] for name in LOGGED if name in os.environ}
        entry = {"argv": sys.argv[1:], "pid": os.getpid(), "environment": variables}
        log.write(json.dumps(entry) + "\n")
    if sys.argv[1] == "calibrate":
        time.sleep(float(os.environ.get("MOCK_SECONDS", "0")))
        if "--fail" in sys.argv:
            return 3
        output = Path(option("--output"))
        output.mkdir()
        (output / "config.json").write_text("{}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    HTTPServer((option("--host"), int(option("--port"))), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
