# SPDX-License-Identifier: Apache-2.0
"""With a key set every route asks for it but health, readiness and those opened.

The app is vLLM's own, with all its routes and ours, built in this process without an engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from starlette.testclient import TestClient, WebSocketDenialResponse

from vllm_eigen.plugin.vllm_version import own_module
from vllm_eigen.server.commands import serve
from vllm_eigen.server.http.access import AccessMiddleware

pytestmark = pytest.mark.anyio
KEY = "sk-of-this-test"
OPEN = {"/health", "/ready", "/metrics"}

Build = Callable[..., FastAPI]


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    """Builds the server's app as `vllm-eigen serve` does, from flags."""
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = own_module().make_arg_parser(FlexibleArgumentParser())
    serve.add_own_arguments(parser)

    def built(*flags: str, tasks: tuple[str, ...] = ("generate",)) -> FastAPI:
        app: FastAPI = build_app(parser.parse_args(["model", *flags]), tasks, None)
        app.state.engine_client = None
        return app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", ",".join(serve.PLUGINS))
        patch.delenv("VLLM_API_KEY", raising=False)
        yield built


def client(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)


def routes(app: FastAPI) -> set[tuple[str, str]]:
    """Method and path of every route, with the parts in braces filled in."""
    found = set()
    for route in app.routes:
        path = re.sub(r"\{.*?\}", "x", getattr(route, "path", "") or "/")
        for method in getattr(route, "methods", None) or ("GET", "POST"):
            found.add((method, path))
    return found


async def unguarded(app: FastAPI, **headers: str) -> set[str]:
    """Paths that answer without the key."""
    found = set()
    async with client(app) as http:
        for method, path in sorted(routes(app)):
            if not path.endswith("/stream"):
                answer = await http.request(method, path, headers=headers)
                if answer.status_code != 401:
                    found.add(path)
    return found


async def test_no_route_answers_without_the_key(build: Build) -> None:
    app = build("--api-key", KEY)
    asked = {path for _, path in routes(app)}
    for path in ("/invocations", "/tokenize", "/docs", "/openapi.json", "/load", "/dashboard",
                 "/scale_elastic_ep", "/v1/completions", "/ping"):  # fmt: skip
        assert path in asked
    assert await unguarded(app) == OPEN
    assert await unguarded(app, Authorization="Bearer wrong") == OPEN
    assert await unguarded(app, Authorization=KEY) == OPEN
    async with client(app) as http:
        for path in ("/no/such/route", "/", "/healthy", "/metricsx", "/health/../load", "//load"):
            assert (await http.get(path)).status_code == 401, path
        assert (await http.options("/invocations")).status_code == 401
        key = {"Authorization": f"Bearer {KEY}"}
        for path in ("/openapi.json", "/dashboard", "/version", "/metrics"):
            assert (await http.get(path, headers=key)).status_code == 200, path


async def test_routes_are_opened_and_closed_by_name(build: Build) -> None:
    app = build("--api-key", KEY, "--open-routes", "/dashboard", "/docs", "/v1/models")
    # What vLLM guards itself stays closed; metrics are no longer named.
    assert await unguarded(app) == {
        *("/health", "/ready", "/dashboard", "/dashboard/x", "/docs", "/docs/oauth2-redirect"),
    }
    assert await unguarded(build("--api-key", KEY, "--open-routes")) == {"/health", "/ready"}


async def test_keys_of_the_environment_and_other_models(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert await unguarded(build()) == OPEN
    assert await unguarded(build(tasks=("embed",))) == OPEN
    monkeypatch.delenv("VLLM_API_KEY")
    assert "/version" in await unguarded(build())


async def test_below_a_root_path(build: Build) -> None:
    app = build("--api-key", KEY, "--root-path", "/prefix")
    async with client(app) as http:
        for prefix in ("", "/prefix"):
            assert (await http.get(f"{prefix}/health")).status_code == 200
            for path in ("/version", "/dashboard", "/v1/models"):
                assert (await http.get(prefix + path)).status_code == 401
        assert (await http.get("/prefixhealth")).status_code == 401


async def test_bodies_are_bounded_behind_the_key(build: Build) -> None:
    app = build("--api-key", KEY, "--max-body-size", "1KiB")
    key: dict[str, Any] = {"headers": {"Authorization": f"Bearer {KEY}"}}
    async with client(app) as http:
        for path in ("/invocations", "/tokenize", "/v1/completions"):
            assert (await http.post(path, content=b"x" * 1025)).status_code == 401
            answer = await http.post(path, content=b"x" * 1025, **key)
            assert answer.status_code == 413
            assert "1.0 KiB" in answer.json()["error"]["message"]


async def test_ready_follows_the_life_of_the_server(build: Build) -> None:
    app = build("--api-key", KEY)
    drain = app.state.eigen_drain
    async with client(app) as http:

        async def status(path: str) -> int:
            return (await http.get(path)).status_code

        assert (await status("/health"), await status("/ready")) == (200, 503)
        drain.serving = True
        assert (await status("/health"), await status("/ready")) == (200, 200)
        drain.begin()
        assert (await status("/health"), await status("/ready")) == (200, 503)


@pytest.mark.unit
def test_sockets_need_the_key() -> None:
    app = FastAPI()
    app.add_middleware(AccessMiddleware, keys=[KEY])

    @app.websocket("/socket")
    async def socket(peer: WebSocket) -> None:
        await peer.accept()
        await peer.send_text("open")
        await peer.close()

    with TestClient(app) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic " + KEY}):
            with pytest.raises(WebSocketDenialResponse) as refused:
                with http.websocket_connect("/socket", headers=headers):
                    pass
            assert refused.value.status_code == 401
        with http.websocket_connect("/socket", headers={"Authorization": f"Bearer {KEY}"}) as peer:
            assert peer.receive_text() == "open"
