# SPDX-License-Identifier: Apache-2.0
"""Who may ask what: with an API key set, every route asks for it but health and those named.

By itself vLLM asks for the key below `/v1` and a few more prefixes; `/invocations`, which completes
prompts, `/tokenize`, `/docs` and all others stay open.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

ALWAYS_OPEN = ("/health", "/ready")
"""Probes of a platform carry no key; these routes tell nothing but a status."""
OPEN_BY_DEFAULT = ("/metrics",)


class AccessMiddleware:
    """ASGI middleware that answers 401 to a request without one of the keys.

    Args:
        keys: accepted as `Authorization: Bearer KEY`.
        open_routes: paths that, with all below them, need no key, beside `ALWAYS_OPEN`.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], open_routes: Sequence[str] = OPEN_BY_DEFAULT
    ) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]
        self._open = (*ALWAYS_OPEN, *open_routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] in ("http", "websocket") and not (
            self._is_open(_route_path(scope)) or self._has_key(Headers(scope=scope))
        ):
            headers = {"WWW-Authenticate": "Bearer"}
            response = JSONResponse({"error": "Unauthorized"}, 401, headers)  # as vLLM's own
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return any(
            path == route or path.startswith(f"{route.rstrip('/')}/") for route in self._open
        )

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(_digest(key), digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _route_path(scope: Scope) -> str:
    """The path below `--root-path`, as the router takes it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
