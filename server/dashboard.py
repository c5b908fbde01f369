"""`/dashboard`: a static page over the memory API, without build step or outside resource.

The page holds no data and needs no key; what it shows it asks from `/v1`, relative to its own
address, so it works behind any `--root-path`.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, HTTPException, Response

STATIC = files("server") / "static"
TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@router.get("/dashboard")
async def page() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/dashboard/{name}")
async def asset(name: str) -> Response:
    """A script, style sheet or picture of the page."""
    return _file(name)


def _file(name: str) -> Response:
    """A file of the static folder; 404 for any other name."""
    kind = TYPES.get(name.rpartition(".")[2])
    if kind is None or "/" in name or "\\" in name or not (STATIC / name).is_file():
        raise HTTPException(404, detail="the dashboard has no such file")
    content = (STATIC / name).read_bytes()
    return Response(content, media_type=kind, headers=HEADERS)
