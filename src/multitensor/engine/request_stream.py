"""A request's outputs on their way from the engine's thread to a task of the event loop (never imports torch)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from multitensor.engine.request import RequestOutput
from multitensor.engine.request_state import Request


class RequestChannel:
    """One request between two threads. Everything but `request`, `cancelled` and what is said otherwise belongs to the
    event loop. Holds one output at most: what a slow reader has not fetched is merged, so memory does not grow."""

    def __init__(self, key: str, group: object) -> None:
        self.key = key
        self.group = group  # the same for requests that were admitted as one
        self.request: Request | None = None  # set by the engine's thread when it has taken the request
        self.cancelled = False  # set by the event loop (or a finalizer), read by the engine's thread
        self.ended = False
        self._pending: RequestOutput | None = None
        self._error: BaseException | None = None
        self._admitted = asyncio.Event()
        self._news = asyncio.Event()

    @property
    def waiting(self) -> bool:
        """No part of it has been scheduled yet. Any thread."""
        request = self.request
        return request is None or request.metrics.first_scheduled_time is None

    def admit(self) -> None:
        self._admitted.set()

    def push(self, output: RequestOutput) -> None:
        if self._pending is not None:
            for new, old in zip(output.outputs, self._pending.outputs, strict=True):
                new.delta = old.delta + new.delta
        self._pending = output
        self.ended = self.ended or output.finished
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Outputs that came before are still handed out first."""
        if not self.ended:
            self._error = error
            self.ended = True
        self._wake()

    def end(self) -> None:
        """No more will come."""
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self._admitted.set()
        self._news.set()

    async def admitted(self) -> None:
        await self._admitted.wait()
        if self._pending is None and self._error is not None:
            raise self._error

    async def next(self) -> RequestOutput:
        while self._pending is None:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self.ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        output, self._pending = self._pending, None
        return output


class RequestStream:
    """Async iterator over a request's outputs: each holds everything so far, and what is new since the one before in
    `.delta` of each continuation. Closing it, dropping it, or cancelling the task that waits for an item cancels the
    request. Also an async context manager, which closes it."""

    def __init__(self, channel: RequestChannel, cancel: Callable[[RequestChannel], None]) -> None:
        self._channel = channel
        self._cancel = cancel

    async def admitted(self) -> None:
        """Returns when the engine has queued the request, before its first token; raises what `anext` would have
        raised had it not (InputError for a grammar that cannot be compiled, RankFailed)."""
        try:
            await self._channel.admitted()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        try:
            return await self._channel.next()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends the request now; nothing more comes. Safe to call twice, or after its end."""
        self._cancel(self._channel)
        self._channel.end()

    async def aclose(self) -> None:
        self.cancel()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        # Perhaps in another thread, so nothing that belongs to the event loop is touched.
        self._cancel(self._channel)
