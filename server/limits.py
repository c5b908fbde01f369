"""Bounds on request bodies: vLLM's server has none, and would read a body of any size.

Sits inside vLLM's authentication, so a body is measured only for a caller with a key.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_response

MAX_BODY_BYTES = 64 << 20
"""Far above a prompt of a million tokens; images and audio travel as base64 in it."""
BODY_SECONDS = 60.0
"""Longest silence between two pieces of a body."""
_DRAIN_SECONDS = 10.0


class BodyLimit:
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

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:  # what follows is the client's leaving, at any time
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

        await self._app(scope, bounded, send)

    @property
    def _too_large(self) -> str:
        return f"the request body is larger than {self._max_bytes >> 20} MiB"

    async def _refuse(self, receive: Receive, send: Send) -> None:
        """Answer 413, then let the client finish sending: closing at once may lose the answer."""
        answer = error_response(413, self._too_large, {"connection": "close"})
        start = {"type": "http.response.start", "status": 413, "headers": answer.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": bytes(answer.body), "more_body": True})
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while (await receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _content_length(scope: Any) -> int:
    """The announced size of the body, 0 if none or no number."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
