# SPDX-License-Identifier: Apache-2.0
"""Errors in OpenAI's shape, as vLLM answers its own: for our routes, the middleware and routing."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


class OpenAIErrorInfo(BaseModel):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None = None
    code: int | None = None


class OpenAIError(BaseModel):
    """The body of an error response."""

    error: OpenAIErrorInfo


class Unauthorized(BaseModel):
    """vLLM's response to a missing or wrong API key."""

    error: str


def error_response(
    status: int, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A JSON response `{"error": {"message", "type", "param", "code"}}`."""
    info = OpenAIErrorInfo(message=message, type=HTTPStatus(status).phrase, code=status)
    return JSONResponse(OpenAIError(error=info).model_dump(), status, headers)


async def http_exception_handler(request: Request, error: Exception) -> JSONResponse:
    """Response to an unknown path (404) or method (405), and to every other HTTPException."""
    if not isinstance(error, HTTPException):
        raise error
    return error_response(error.status_code, str(error.detail), dict(error.headers or {}))
