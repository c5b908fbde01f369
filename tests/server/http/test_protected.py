# SPDX-License-Identifier: Apache-2.0
"""A server with a key, a root path and two API processes."""

from __future__ import annotations

import json
import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.browser import number, page, wait_until
from tests.server.conftest import KEY, NAME, ROOT_PATH
from tests.server.load import observe
from vllm_eigen.server.launch.process import ServerProcess

pytestmark = pytest.mark.anyio

AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
ROUTES = ("/v1/kv_cache", "/v1/kv_cache/history", "/v1/kv_cache/stream?limit=1")


@pytest.mark.parametrize("prefix", ["", ROOT_PATH])
@pytest.mark.parametrize("route", ROUTES)
def test_routes_need_the_key(guarded: ServerProcess, prefix: str, route: str) -> None:
    url = f"{guarded.url}{prefix}{route}"
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        answer = httpx.get(url, headers=headers)
        assert answer.status_code == 401
        assert "error" in answer.json()
    assert httpx.get(url, headers=AUTHORIZED).status_code == 200


def test_openai_client_with_key(guarded: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, timeout=60)
    assert client.completions.create(model=NAME, prompt="x", max_tokens=1).usage is not None
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="no").models.list()


async def test_both_processes_tell_the_same(guarded: ServerProcess) -> None:
    prompts = (60, 200, 300)
    async with httpx.AsyncClient(base_url=guarded.url, headers=AUTHORIZED, timeout=60) as client:
        seen = await observe(client, prompts, lambda: _fresh(guarded, "/v1/kv_cache"))
    for answer, low, high in seen:
        slack = answer["block_size"] * len(prompts)
        assert answer["requests"]["running"] == len(prompts), seen
        # The other process may have counted a few steps more than this client has received.
        assert low - slack <= answer["tokens"]["used"] <= high + 60 + slack, seen
    end = time.monotonic() + 20
    while True:
        answers = [await _fresh(guarded, "/v1/kv_cache") for _ in range(4)]
        if all(answer["tokens"]["used"] == 0 for answer in answers):
            break
        assert time.monotonic() < end, answers
    histories = [await _fresh(guarded, "/v1/kv_cache/history?seconds=30") for _ in range(8)]
    peaks = {max(sample["running"] for sample in one["samples"]) for one in histories}
    assert 0 not in peaks


def test_gauges_have_one_sample_for_all_processes(guarded: ServerProcess) -> None:
    cache = httpx.get(f"{guarded.url}/v1/kv_cache", headers=AUTHORIZED).json()
    for _ in range(4):
        found = {}
        text = httpx.get(f"{guarded.url}/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("vllm_eigen:"):
                    assert set(sample.labels) <= {"model_name", "layer", "part"}
                    key = (sample.name, json.dumps(sample.labels, sort_keys=True))
                    assert key not in found
                    found[key] = sample.value
        values = {name: value for (name, _), value in found.items()}
        assert values["vllm_eigen:pool_bytes"] == cache["pool_bytes"]
        assert values["vllm_eigen:capacity_tokens"] == cache["tokens"]["capacity"]


def test_pool_is_explained_once(guarded: ServerProcess) -> None:
    assert guarded.log.read_text().count("uncompressed it would hold") == 1


@pytest.mark.parametrize("prefix", ["", ROOT_PATH])
def test_dashboard_asks_for_the_key(guarded: ServerProcess, prefix: str) -> None:
    with page() as tab:
        tab.goto(f"{guarded.url}{prefix}/dashboard")
        tab.wait_for_selector("#key-dialog[open]")
        tab.fill("#key", "wrong")
        tab.keyboard.press("Enter")
        wait_until(lambda: "not accept" in tab.inner_text("#key-error"))
        tab.fill("#key", KEY)
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#status[data-state=live]")
        cache = httpx.get(f"{guarded.url}/v1/kv_cache", headers=AUTHORIZED).json()
        assert number(tab, "pool-bytes") == cache["pool_bytes"]
        tab.fill("#max-tokens", "8")
        tab.fill("#message", "Hello")
        tab.click("#send")
        wait_until(lambda: "tokens in" in tab.inner_text("#play-note"))


async def _fresh(server: ServerProcess, path: str) -> dict:
    """An answer over a new connection, which either process may take."""
    async with httpx.AsyncClient(
        base_url=server.url, headers=AUTHORIZED, verify=False, timeout=30
    ) as client:
        answer = await client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()
