"""Answers that know when their reader leaves: server-sent events as plain bytes, and waiting for a result."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from multitensor.server.errors import HungUp, to_api_error

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
_PING = b": still working\n\n"


def event(data: Any) -> bytes:
    """One `data:` event; JSON has no raw newline, so one line is enough."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def until_hang_up(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; when the client leaves first, the work is cancelled and HungUp raised. The request's body
    must have been read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUp
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends what `events` yields; the generator is closed when it is done and when the reader leaves. An error becomes
    the last event. ping_seconds: a comment after so much silence, so that nothing on the way takes the connection for
    dead."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], ping_seconds: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._ping_seconds = ping_seconds
        self._last_sent = 0.0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        tasks = [
            asyncio.ensure_future(self._send_all(send)),
            asyncio.ensure_future(_disconnected(receive)),
            asyncio.ensure_future(self._ping(send)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
        except OSError:  # the reader is gone, or takes nothing
            return
        except Exception as error:
            data = event(to_api_error(error).body())
            await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(max(0.0, self._last_sent + self._ping_seconds - loop.time()) + 0.01)
            if loop.time() - self._last_sent >= self._ping_seconds and not self._sending.locked():
                await self._send(send, {"type": "http.response.body", "body": _PING, "more_body": True})

    async def _send(self, send: Send, message: Message) -> None:
        async with self._sending:
            await send(message)
        self._last_sent = asyncio.get_running_loop().time()
