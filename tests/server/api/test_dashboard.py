# SPDX-License-Identifier: Apache-2.0
"""The page shows what the API says, moves under load, and can be used without a mouse."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import pytest
from fastapi import HTTPException

from tests.server.browser import PHONE, number, page, wait_until
from tests.server.conftest import NAME
from vllm_eigen.server.api import dashboard
from vllm_eigen.server.api.dashboard import MEDIA_TYPES, STATIC
from vllm_eigen.server.launch.process import ServerProcess

LIVE = "#status[data-state=live]"
SHOWN = """() => Object.fromEntries(["used-bytes", "saved-bytes", "used-tokens"].map(
    (id) => [id.replace("-", "_"), Number(document.getElementById(id).dataset.value)]))"""


@contextlib.contextmanager
def load(server: ServerProcess, count: int) -> Iterator[None]:
    """Long requests in the background, aborted at the end of the block."""
    done = threading.Event()

    def generate(seed: int) -> None:
        body = {
            "model": NAME, "prompt": [3 + seed] * 200, "max_tokens": 800, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        while not done.is_set():
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json=body, timeout=120
            ) as answer:
                next(line for line in answer.iter_lines() if done.is_set() or "[DONE]" in line)

    threads = [threading.Thread(target=generate, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=120)


def test_numbers_are_those_of_the_api_and_move_under_load(plain: ServerProcess) -> None:
    with page() as tab:
        tab.goto(f"{plain.url}/dashboard")
        tab.wait_for_selector(LIVE)
        cache = httpx.get(f"{plain.url}/v1/kv_cache").json()
        assert tab.inner_text("#model") == NAME
        assert number(tab, "pool-bytes") == cache["pool_bytes"]
        assert number(tab, "capacity") == cache["tokens"]["capacity"]
        assert number(tab, "capacity-plain") == cache["uncompressed"]["tokens_capacity"]
        assert number(tab, "bytes-per-token") == cache["bytes_per_token"]
        assert number(tab, "ratio") == cache["kv_ratio"]
        assert number(tab, "possible") == cache["concurrency"]["possible"]
        assert tab.locator("#ranks-table tr").count() == len(cache["layers"])
        assert tab.locator("#ranks-chart rect").count() == 2 * len(cache["layers"])

        with load(plain, 4):
            wait_until(lambda: number(tab, "used-bytes") > 0)
            before = tab.get_attribute("#used-line", "d")
            shown = tab.evaluate(SHOWN)
            wait_until(lambda: tab.get_attribute("#used-line", "d") != before)
            wait_until(lambda: number(tab, "generation") > 0)
        samples = httpx.get(f"{plain.url}/v1/kv_cache/history?seconds=60").json()["samples"]
        assert shown in [{name: sample[name] for name in shown} for sample in samples]
        wait_until(lambda: number(tab, "running") == 0)


class _Base(BaseHTTPRequestHandler):
    """Statistics of a base model, for any page; notes who asked with a key."""

    cache: ClassVar[dict[str, Any]] = {}
    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        self.send_response(200)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()
        self.wfile.write(json.dumps(self.cache).encode())

    def log_message(self, *words: object) -> None:
        pass


def test_the_base_model_is_shown_beside(plain: ServerProcess) -> None:
    ours = httpx.get(f"{plain.url}/v1/kv_cache").json()
    _Base.cache = ours | {"bytes_per_token": 4 * ours["bytes_per_token"]}
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Base)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with page(viewport=PHONE) as tab:
            tab.goto(f"{plain.url}/dashboard?base=http://127.0.0.1:{server.server_port}")
            wait_until(lambda: "0.25" in tab.inner_text("#base-table"))
            assert tab.locator("#base-table tr").count() == 9
            assert set(_Base.keys) == {None}
            assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
            tab.goto(f"{plain.url}/dashboard")
            tab.wait_for_selector(LIVE)
            assert not tab.is_visible("#base")
    finally:
        server.shutdown()


def test_bits_have_a_chart_where_they_differ(plain: ServerProcess) -> None:
    cache = httpx.get(f"{plain.url}/v1/kv_cache").json()
    with page() as tab:
        tab.goto(f"{plain.url}/dashboard")
        tab.wait_for_selector(LIVE)
        assert not tab.is_visible("#bits")
    for place, layer in enumerate(cache["layers"]):
        layer |= {"bits_k": 3.5 + place / 8, "bits_v": 5.0}
    with page(viewport=PHONE) as tab:
        tab.route("**/v1/kv_cache", lambda route: route.fulfill(json=cache))
        tab.goto(f"{plain.url}/dashboard")
        tab.wait_for_selector("#bits rect")
        bars = tab.locator("#bits rect")
        assert bars.count() == 2 * len(cache["layers"])
        assert "key rank 38, 3.5 bits" in bars.first.text_content()
        heights = [float(bars.nth(place).get_attribute("height")) for place in (0, 2)]
        assert heights[0] < heights[1]
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.anyio
async def test_only_an_address_can_be_compared_with() -> None:
    for wrong in ("evil.example", "http://a;script-src *", "http://a b", "javascript:x", "http://"):
        with pytest.raises(HTTPException):
            await dashboard.page(wrong)
    policy = (await dashboard.page("http://a:1/prefix")).headers["Content-Security-Policy"]
    assert "connect-src 'self' http://a:1;" in policy
    plain = (await dashboard.page()).headers["Content-Security-Policy"]
    assert plain == policy.replace(" http://a:1", "")


def test_playground_streams_by_keyboard(plain: ServerProcess) -> None:
    with page() as tab:
        tab.goto(f"{plain.url}/dashboard")
        tab.wait_for_selector(LIVE)
        tab.fill("#max-tokens", "24")
        for _ in range(30):
            tab.keyboard.press("Tab")
            if tab.evaluate("document.activeElement.id") == "message":
                break
        tab.keyboard.type("Hello")
        tab.keyboard.press("Enter")
        wait_until(lambda: "tokens in" in tab.inner_text("#play-note"))
        assert tab.inner_text("#talk .user") == "Hello"
        assert tab.inner_text("#talk .assistant")
        tab.click("#clear")
        assert tab.locator("#talk li").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_colours(plain: ServerProcess, scheme: str) -> None:
    with page(viewport=PHONE, color_scheme=scheme) as tab:
        tab.goto(f"{plain.url}/dashboard")
        tab.wait_for_selector(LIVE)
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        colour = "getComputedStyle(document.documentElement).backgroundColor"
        system = tab.evaluate(colour)
        tab.click("#theme-button")
        light = tab.evaluate(colour)
        tab.click("#theme-button")
        dark = tab.evaluate(colour)
        assert light != dark
        assert system == (light if scheme == "light" else dark)


def test_page_asks_for_nothing_outside(http: httpx.Client) -> None:
    for path in STATIC.iterdir():
        name = path.name
        answer = http.get("/dashboard" if name == "index.html" else f"/dashboard/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(MEDIA_TYPES[name.rpartition(".")[2]])
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
