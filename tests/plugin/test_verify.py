# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen verify` on vLLM itself."""

from __future__ import annotations

import json

import pytest

from tests.plugin.conftest import Rows
from tests.plugin.harness.engine import start_quickly
from tests.plugin.harness.rows import CODED_ROWS
from vllm_eigen import cli


@pytest.mark.slow
def test_verify(
    served: Rows, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_quickly(monkeypatch)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    [row] = (row for row in CODED_ROWS if str(row) == "llama-post-rope-coded")
    capfd.readouterr()
    status = cli.main(["verify", str(served(row).eigen), "--dtype", "float32", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert {check["name"]: check["state"] for check in found["checks"]} == dict.fromkeys(
        ["capacity", "prefill", "chunked prefill", "decode", "prefix hit", "preemption"], "ok"
    )
    assert (status, found["passed"], found["dtype"]) == (0, True, "float32")
