"""Errors of our routes in OpenAI's shape, as vLLM gives its own."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from server.schemas import ErrorInfo, KVCacheError


def error_response(
    status: int, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A JSON answer `{"error": {"message", "type", "param", "code"}}`."""
    info = ErrorInfo(message=message, type=HTTPStatus(status).phrase, param=None, code=status)
    return JSONResponse(KVCacheError(error=info).model_dump(), status_code=status, headers=headers)


async def routing_error(request: Request, error: Exception) -> JSONResponse:
    """Answer of an unknown path (404) or method (405), which vLLM leaves to the framework."""
    if not isinstance(error, HTTPException):
        raise error
    return error_response(error.status_code, str(error.detail), dict(error.headers or {}))
