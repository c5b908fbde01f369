# SPDX-License-Identifier: Apache-2.0
"""`GET /ready`: whether a load balancer should send requests here.

vLLM's own `/health` says that the process and its engine live, also while they finish their last
requests. Before the engine is up, vLLM does not listen at all.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from vllm_eigen.server.http.drain import DrainState
from vllm_eigen.server.http.errors import OpenAIError, error_response

router = APIRouter(tags=["probes"])


@router.get(
    "/ready",
    summary="Whether new requests are taken",
    response_class=Response,
    responses={503: {"model": OpenAIError, "description": "The server starts or shuts down"}},
)
async def ready(request: Request) -> Response:
    """200 from the moment the server takes requests until it begins to shut down, else 503."""
    state = request.app.state
    drain: DrainState = state.eigen_drain
    server = getattr(state, "server", None)
    if drain.draining:
        since = f"{drain.draining_seconds:.3f} s ago"
        return error_response(503, f"the server began to shut down {since}")
    if server is not None and server.should_exit:
        return error_response(503, "the server is shutting down")
    if not drain.serving:
        return error_response(503, "the server is starting")
    engine = getattr(state, "engine_client", None)
    if engine is not None and engine.errored:
        return error_response(503, "the engine has failed")
    return Response(status_code=200)
