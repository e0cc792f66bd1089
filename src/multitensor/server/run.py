"""From settings to a server that has drained: socket first, then the model, then uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import uvicorn

from multitensor.errors import InputError, RankFailed
from multitensor.server.auth import read_keys
from multitensor.server.settings import ServerSettings

if TYPE_CHECKING:
    from multitensor.engine.async_engine import AsyncEngine

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75
_LAST_WORDS_SECONDS = 2.0  # for sending the error that an answer ends with when the drain is over
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(settings: ServerSettings) -> tuple[socket.socket, ServerSettings]:
    """The address, taken before anything costly is done; port 0 is resolved in the settings that come back.
    Raises InputError in one line when it cannot be had."""
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {settings.host}: {error.strerror}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # With SO_REUSEADDR two can bind one port as long as neither listens. Who connects before the model is loaded
        # waits for it.
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise InputError(f"cannot listen on {where}: {error.strerror}; choose another --port") from None
    return sock, replace(settings, port=sock.getsockname()[1])


def check_files(settings: ServerSettings) -> None:
    """Raises InputError for key and certificate files that would fail later, after the model was loaded."""
    if settings.api_keys is not None:
        read_keys(settings.api_keys)
    if settings.tls_cert is not None and settings.tls_key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, lambda: "")
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "reason", None) or error.strerror or "no PEM certificate with its key"
            raise InputError(f"--tls-cert {settings.tls_cert}, --tls-key {settings.tls_key}: {reason}") from None


async def serve(
    engine: AsyncEngine, settings: ServerSettings, sock: socket.socket, started: Callable[[], None]
) -> None:
    """Serves a started engine until SIGINT or SIGTERM, then lets answers under way end within drain_seconds; what is
    left then, or at a second signal, is ended with an error that its client sees. started: called when requests are
    taken. Raises RankFailed when the ranks have failed and cannot be started again: only a new process can help."""
    from multitensor.server.app import create_app

    config = uvicorn.Config(
        create_app(engine, settings),
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds + _LAST_WORDS_SECONDS),
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        backlog=_BACKLOG,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
    )
    server = _Server(config, engine, settings.drain_seconds, started)
    # Making the app takes a moment, and Ctrl-C meanwhile takes effect at the next await: here, with nothing begun, and
    # not within uvicorn's start, which would answer with a traceback.
    await asyncio.sleep(0)
    await server.serve([sock])
    if engine.given_up:
        raise RankFailed(f"the ranks failed and could not be started again: {engine.failure}")


class _Server(uvicorn.Server):
    """uvicorn's own handling raises the signal again after shutting down, which would end the process before the
    ranks are."""

    def __init__(
        self, config: uvicorn.Config, engine: AsyncEngine, drain_seconds: float, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        self.should_exit = self.should_exit or self._engine.given_up
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own end of the drain cuts answers off in the middle; the engine's comes before it, as an error."""
        deadline = asyncio.get_running_loop().call_later(self._drain_seconds, self._engine.end_requests)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self.should_exit:
            self._engine.end_requests()
            asyncio.get_running_loop().call_later(_LAST_WORDS_SECONDS, self._force)
        self.should_exit = True

    def _force(self) -> None:
        self.force_exit = True
