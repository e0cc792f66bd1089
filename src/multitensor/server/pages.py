"""The chat page: files of this package, sent with headers under which a browser loads nothing from elsewhere."""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import Response

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked anew each time, answered 304 when unchanged: an upgrade is seen at once
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def page_router() -> APIRouter:
    """`/` and `/static/NAME` for the package's own files, which are read once."""
    router = APIRouter(include_in_schema=False)
    files = {
        entry.name: (entry.read_bytes(), TYPES[suffix])
        for entry in (resources.files("multitensor.server") / "static").iterdir()
        if (suffix := "." + entry.name.rpartition(".")[2]) in TYPES
    }

    def answer(name: str, request: Request) -> Response:
        if name not in files:
            return Response("there is no such file\n", 404, HEADERS, "text/plain; charset=utf-8")
        content, media_type = files[name]
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return answer("index.html", request)

    @router.api_route("/static/{name}", methods=["GET", "HEAD"])
    async def static(name: str, request: Request) -> Response:
        return answer(name, request)

    return router
