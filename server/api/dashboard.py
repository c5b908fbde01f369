# SPDX-License-Identifier: Apache-2.0
"""`/dashboard`: a static page over `/v1/kv_cache`, without build step or external resource.

The page requests its data from `/v1`, relative to its own address, so it works behind any
`--root-path`. It holds no data itself: with an API key set, `--open-routes /dashboard` opens it to
browsers, and it asks for the key. `?base=http://host:port` shows another server's statistics beside
ours; the page may ask that one server too, and sends it no key.
"""

from __future__ import annotations

import re
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Response

STATIC = files("vllm_eigen.server.api") / "static"
MEDIA_TYPES = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
POLICY = "Content-Security-Policy"
HEADERS = {
    "Cache-Control": "no-cache",
    POLICY: "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@router.get("/dashboard")
async def page(base: str = "") -> Response:
    """The page; `base` is the address of a server to compare with, without a path or with one."""
    response = _file("index.html")
    if base:
        found = re.fullmatch(r"(https?://[\w.-]+(?::\d{1,5})?)(?:/[\w./-]*)?", base, re.ASCII)
        if found is None:
            raise HTTPException(400, detail="base must be an address such as http://host:8001")
        policy = HEADERS[POLICY].replace("connect-src 'self'", f"connect-src 'self' {found[1]}")
        response.headers[POLICY] = policy
    return response


@router.get("/dashboard/{name}")
async def asset(name: str) -> Response:
    """A script, style sheet or image of the page."""
    return _file(name)


def _file(name: str) -> Response:
    """A file of the static folder; 404 for any other name."""
    media_type = MEDIA_TYPES.get(name.rpartition(".")[2])
    if media_type is None or "/" in name or "\\" in name or not (STATIC / name).is_file():
        raise HTTPException(404, detail="the dashboard has no such file")
    content = (STATIC / name).read_bytes()
    return Response(content, media_type=media_type, headers=HEADERS)
