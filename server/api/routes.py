# SPDX-License-Identifier: Apache-2.0
"""The KV-cache API: `/v1/kv_cache`, its history, and its event stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import StreamingResponse

from vllm_eigen.server.http.errors import OpenAIError, Unauthorized
from vllm_eigen.server.stats.monitor import HISTORY_SECONDS, INTERVAL_SECONDS, Monitor
from vllm_eigen.server.stats.schemas import History, KVCache

RESPONSES: dict[int | str, dict[str, Any]] = {
    401: {"model": Unauthorized, "description": "The server asks for an API key"},
    503: {"model": OpenAIError, "description": "The engine reports no statistics"},
    "4XX": {"model": OpenAIError, "description": "The request is malformed"},
}
_EVENT = {
    "type": "object",
    "description": "One event; its data is a Sample",
    "properties": {
        "event": {"const": "sample"},
        "id": {"type": "string", "description": "time of the sample"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/Sample"},
        },
    },
    "required": ["event", "data"],
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events, one Sample each",
        "content": {"text/event-stream": {"schema": _EVENT}},
    }
}

router = APIRouter(prefix="/v1/kv_cache", tags=["kv cache"], responses=RESPONSES)


def monitor_of(request: Request) -> Monitor:
    """The monitor of this process.

    Raises:
        HTTPException: 503 with the reason there is none.
    """
    monitor = getattr(request.app.state, "eigen_monitor", None)
    if isinstance(monitor, Monitor):
        return monitor
    raise HTTPException(503, detail=str(monitor or "the engine has not reported its KV cache"))


ServerMonitor = Annotated[Monitor, Depends(monitor_of)]


@router.get("", summary="KV cache as allocated and used")
async def kv_cache(monitor: ServerMonitor) -> KVCache:
    """Pool, current use, and bytes per token with and without compression, from the engine."""
    return monitor.snapshot()


@router.get("/history", summary="Use of the KV cache, one sample per second")
async def history(
    monitor: ServerMonitor,
    seconds: Annotated[
        int, Query(ge=1, le=HISTORY_SECONDS, description="how far to look back")
    ] = 300,
) -> History:
    """The last samples, oldest first; the server keeps an hour."""
    return monitor.history(seconds)


@router.get(
    "/stream",
    summary="Use of the KV cache as server-sent events",
    response_class=StreamingResponse,
    responses=EVENTS,
)
async def stream(
    request: Request,
    monitor: ServerMonitor,
    interval: Annotated[int, Query(ge=1, le=60, description="seconds between events")] = 1,
    limit: Annotated[
        int | None, Query(ge=1, le=1_000_000, description="events until the stream ends")
    ] = None,
) -> StreamingResponse:
    """One event immediately, then one every `interval` seconds, until the client disconnects."""
    return StreamingResponse(
        _events(request, monitor, interval, limit),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _events(
    request: Request, monitor: Monitor, interval: int, limit: int | None
) -> AsyncIterator[str]:
    """Samples as events; ends when the server is about to stop, which waits for open responses."""
    sample = monitor.latest()
    sent = 0
    while True:
        yield f"event: sample\nid: {sample.time:.3f}\ndata: {sample.model_dump_json()}\n\n"
        sent += 1
        if sent == limit:
            return
        for _ in range(max(1, interval // INTERVAL_SECONDS)):
            sample = await monitor.next_sample()
            server = getattr(request.app.state, "server", None)
            if server is not None and server.should_exit:
                return
