# SPDX-License-Identifier: Apache-2.0
"""Bounds on request bodies: vLLM's server has none, and would read a body of any size.

Sits inside the check of the API key, so a body is measured only for a caller with a key.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_eigen.common.sizes import format_bytes
from vllm_eigen.server.http.errors import error_response

MAX_BODY_BYTES = 64 << 20
"""Far above a prompt of a million tokens; images and audio travel as base64 in it."""
BODY_SECONDS = 60.0
"""Longest pause between two chunks of a body."""
_DISCARD_SECONDS = 10.0
"""How long the rest of a refused body is read and discarded."""


class BodyLimitMiddleware:
    """ASGI middleware that answers 413 to a huge body and 408 to one that does not arrive."""

    def __init__(
        self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES, seconds: float = BODY_SECONDS
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a `receive` that counts and has a deadline."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _content_length(scope) > self._max_bytes:
            await self._refuse(receive, send)
            return
        received = 0
        complete = False

        async def bounded_receive() -> Message:
            nonlocal received, complete
            if complete:  # all that can follow is the client's disconnect
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._seconds)
            except TimeoutError:
                raise HTTPException(408, detail="the request body did not arrive in time") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_bytes:
                raise HTTPException(413, detail=self._too_large)
            return message

        await self._app(scope, bounded_receive, send)

    @property
    def _too_large(self) -> str:
        return f"the request body is larger than {format_bytes(self._max_bytes)}"

    async def _refuse(self, receive: Receive, send: Send) -> None:
        """Answer 413, then let the client finish sending: closing at once may lose the response."""
        response = error_response(413, self._too_large, {"connection": "close"})
        start = {"type": "http.response.start", "status": 413, "headers": response.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        try:
            async with asyncio.timeout(_DISCARD_SECONDS):
                while (await receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _content_length(scope: Any) -> int:
    """The `Content-Length`, 0 without one or if it is no number."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
