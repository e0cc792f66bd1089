"""The application: routes, errors, documents, and what stands around every request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multitensor.errors import ShuttingDown
from multitensor.server import (
    errors,
    openapi,
    routes_chat,
    routes_completions,
    routes_embeddings,
    routes_models,
    routes_tokens,
)
from multitensor.server.limits import BodyLimit, SlowClientGuard
from multitensor.server.pages import HEADERS, page_router
from multitensor.server.service import Service
from multitensor.server.settings import ServerSettings

if TYPE_CHECKING:
    from multitensor.engine.async_engine import AsyncEngine

_DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"


def create_app(engine: AsyncEngine, settings: ServerSettings) -> FastAPI:
    """The server over an engine that has been started; the caller stops it. Raises InputError when a file of the
    settings cannot be used."""
    from multitensor import __version__

    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await service.finish()

    app = FastAPI(
        title="multitensor",
        version=__version__,
        description="OpenAI-compatible server of one model that is cut over several devices.",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
        lifespan=lifespan,
    )
    app.state.service = service
    errors.install(app)
    openapi.install(app)
    for module in (routes_chat, routes_completions, routes_embeddings, routes_tokens, routes_models):
        app.include_router(module.router)
    app.include_router(routes_models.open_router)
    app.include_router(page_router())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        headers = {**HEADERS, "Content-Security-Policy": _DOCS_POLICY}
        return HTMLResponse(openapi.docs_page(app.openapi()), headers=headers)

    # The last added stands outermost.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    app.add_middleware(_Count, service=service)
    app.add_middleware(SlowClientGuard, seconds=settings.send_seconds)
    return app


class _Count:
    """ASGI middleware: counts requests by route and status, and how long they took. Whatever no handler answered is
    answered here, so that it is counted as what it was, and logged once."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status, started = errors.CLIENT_CLOSED, False

        async def noting(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            # Nobody cancels a request's task but uvicorn, for what outlasts the end of the drain.
            if not started:
                error = ShuttingDown("the server is shutting down; ask again later")
                await errors.to_api_error(error).response()(scope, receive, noting)
        except Exception as error:
            if started:
                raise
            await errors.to_api_error(error).response()(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.request_finished(route, status, time.perf_counter() - began)
