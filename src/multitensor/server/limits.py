"""What one client may take: requests and tokens a minute, requests at once, bytes of a body, seconds of patience."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multitensor.server.auth import Key

DRAIN_SECONDS = 10.0  # a body that is too large is read, and dropped, for so long before the answer


@dataclass(frozen=True)
class Verdict:
    """Whether a request may go on; if not, why (one line, safe to send) and in how many seconds it may."""

    allowed: bool
    reason: str = ""
    retry_after: float = 0.0

    def __bool__(self) -> bool:
        return self.allowed

    @property
    def headers(self) -> dict[str, str]:
        """For the 429: whole seconds, rounded up."""
        return {} if self.allowed else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


ALLOWED = Verdict(True)


@dataclass
class _Bucket:
    """Holds up to a minute's worth and fills evenly. May go below zero: what is not known before is paid after."""

    capacity: float
    level: float
    time: float

    def fill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + (now - self.time) * self.capacity / 60)
        self.time = now

    def wait(self, amount: float) -> float:
        """Seconds until `amount` (or all the bucket can hold, when that is less) is there."""
        return max(0.0, min(amount, self.capacity) - self.level) * 60 / self.capacity


class RateLimiter:
    """Requests and tokens a minute of each key, as token buckets. For any number of threads.

    A request is charged when it comes, its prompt when that is known, the tokens made for it afterwards (`charge`).
    What exceeds a whole minute's limit goes through when the minute is unused, and is then waited for: on average the
    limit holds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def allow(self, key: Key, tokens: int = 0, *, requests: int = 1) -> Verdict:
        """Charges so many requests and prompt tokens, or charges nothing and says why not."""
        with self._lock:
            wanted = [
                (self._bucket(key, kind, limit), kind, limit, amount)
                for kind, limit, amount in (
                    ("requests", key.requests_per_minute, requests),
                    ("tokens", key.tokens_per_minute, max(tokens, 1)),
                )
                if limit is not None and amount > 0
            ]
            waits = [(bucket.wait(amount), kind, limit) for bucket, kind, limit, amount in wanted]
            longest, kind, limit = max(waits, default=(0.0, "", 0))
            if longest > 0:
                reason = f"the API key {key.name} is limited to {limit} {kind} a minute; try again in {longest:.1f} s"
                return Verdict(False, reason, longest)
            for bucket, kind, _, amount in wanted:
                bucket.level -= tokens if kind == "tokens" else amount
            return ALLOWED

    def charge(self, key: Key, tokens: int = 0, *, requests: int = 0) -> None:
        """Takes tokens that were made already; what is negative is given back."""
        charges = (("requests", key.requests_per_minute, requests), ("tokens", key.tokens_per_minute, tokens))
        with self._lock:
            for kind, limit, amount in charges:
                if limit is not None:
                    self._bucket(key, kind, limit).level -= amount

    def _bucket(self, key: Key, kind: str, limit: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault((key.name, kind), _Bucket(limit, limit, now))
        bucket.fill(now)
        bucket.level += limit - bucket.capacity  # the limit may have been changed in the file: what was taken stays so
        bucket.capacity = limit
        return bucket


class StreamLimiter:
    """What is under way at the same time: answers of one key, requests of all together. For any number of threads."""

    def __init__(self, total: int | None = None) -> None:
        self._total = total
        self._lock = threading.Lock()
        self._requests = 0
        self._answers: Counter[str] = Counter()

    @property
    def active(self) -> int:
        """Requests."""
        with self._lock:
            return self._requests

    def enter(self, key: Key, answers: int = 1) -> Verdict:
        """Counts a request for so many answers in, if there is room; then `leave` must follow."""
        with self._lock:
            if key.streams is not None and self._answers[key.name] + answers > key.streams:
                return Verdict(False, f"the API key {key.name} is limited to {key.streams} answers at a time", 1.0)
            if self._total is not None and self._requests >= self._total:
                return Verdict(False, f"the server answers {self._total} requests already, its limit; try later", 1.0)
            self._requests += 1
            self._answers[key.name] += answers
            return ALLOWED

    def leave(self, key: Key, answers: int = 1) -> None:
        with self._lock:
            self._requests -= 1
            self._answers[key.name] -= answers
            if self._answers[key.name] <= 0:
                del self._answers[key.name]


class BodyLimit:
    """ASGI middleware: whole bodies, of a bounded size, that come in bounded time; else 413 or 408.

    The body is read before the application sees the request, so no route can forget the limit.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = 16 << 20, seconds: float = 30.0) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            await _refuse(send, 408, f"the request body did not arrive within {self._seconds:g} s", "request_timeout")
            return
        except ConnectionResetError:
            return
        if body is None:
            await _drain(receive)
            message = f"the request body is larger than the {self._max_bytes} bytes that this server takes"
            await _refuse(send, 413, message, "request_too_large")
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None as soon as it is known to be too large. Raises ConnectionResetError when the client leaves."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            return None
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ConnectionResetError("the client left before its request was complete")
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_bytes:
                return None
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


class SlowClientGuard:
    """ASGI middleware: for a client that does not take what it is sent within `seconds`, sending raises
    ConnectionResetError, as for one that left: its answer ends and frees its place. Others wait for nobody."""

    def __init__(self, app: ASGIApp, seconds: float = 60.0) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        watch = _SendWatch(self._seconds)
        try:
            await self._app(scope, receive, partial(watch.send, send))
        finally:
            watch.end()


class _SendWatch:
    """One timer for all that an answer sends: `asyncio.timeout` around each token would take a tenth of the server's
    time for it. One task sends at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._since = 0.0
        self._sender: asyncio.Task[Any] | None = None  # who sends now
        self._late: asyncio.Task[Any] | None = None  # whose sending was ended
        self._timer: asyncio.TimerHandle | None = None

    async def send(self, send: Send, message: Message) -> None:
        """Raises ConnectionResetError when it takes too long."""
        self._since, self._sender = self._loop.time(), asyncio.current_task()
        if self._timer is None:
            self._timer = self._loop.call_at(self._since + self._seconds, self._look)
        try:
            await send(message)
        except asyncio.CancelledError:
            task = self._sender
            if task is None or self._late is not task:
                raise
            self._late = None
            if task.uncancel() > 0:  # somebody else wants its end, too
                raise
            raise ConnectionResetError(f"the client took nothing for {self._seconds:g} s") from None
        finally:
            self._sender = None

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        since = self._since if self._sender is not None else now
        if self._sender is not None and now >= since + self._seconds:
            self._late = self._sender
            self._sender.cancel()
            since = now
        self._timer = self._loop.call_at(since + self._seconds, self._look)


async def _drain(receive: Receive) -> None:
    """Drops the rest of a body: a client that is still sending would meet a closed connection, not the answer."""
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    """An answer in OpenAI's shape, made here because no route has seen the request."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
