"""Who asks, what that costs them, and the record of it: keys, limits and the audit log around every request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from multitensor.errors import MultitensorError, Overloaded, RankFailed
from multitensor.server.audit import AuditError, AuditLog
from multitensor.server.auth import AuthError, Key, KeyStore, authenticate
from multitensor.server.errors import ApiError, HungUp, bad_request, to_api_error
from multitensor.server.limits import RateLimiter, StreamLimiter
from multitensor.server.metrics import Metrics
from multitensor.server.settings import ServerSettings, is_loopback

logger = logging.getLogger(__name__)


@dataclass
class Record:
    """What the audit log and the metrics hear of a request. outcome: how it ended ("stop", "length", "tool_calls",
    "cancelled", "error ..."). content: question and answer; goes no further than a log that was told to keep it.
    started: when the request had arrived, in seconds of `time.perf_counter`."""

    key: Key
    route: str
    model: str
    prompt_tokens: int
    content: dict[str, Any] = field(default_factory=dict)
    completion_tokens: int = 0
    outcome: str = ""
    started: float = field(default_factory=time.perf_counter)
    metrics: Metrics | None = None
    _last: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)

    def count_tokens(self, prompt: int, choice: int, total: int, now: float, began: float | None = None) -> None:
        """A prompt's choice has `total` tokens at `now`. began: when its prompt's first token was made, if known."""
        known, last = self._last.get((prompt, choice), (0, began or now))
        new = total - known
        if new <= 0:
            return
        if self.metrics is not None:
            if not self._last:
                self.metrics.first_token(now - self.started)
            gaps = new if known else new - 1
            for _ in range(gaps):  # tokens that came together came one after another, as far as anybody knows
                self.metrics.next_token((now - last) / gaps)
        self._last[prompt, choice] = total, now
        self.completion_tokens += new


class Access:
    """Keys, limits and audit log of one server. Raises InputError when a file cannot be used."""

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._settings = settings
        self.keys = KeyStore.load(settings.api_keys) if settings.api_keys else None
        self.rates = RateLimiter()
        self.streams = StreamLimiter(settings.max_streams)
        self.audit = AuditLog(settings.audit_log, settings.audit_content) if settings.audit_log else None

    def close(self) -> None:
        if self.audit is not None:
            self.audit.close()

    def authenticate(self, request: Request) -> Key:
        """Whose request it is. Raises ApiError 401."""
        try:
            return authenticate(self.keys, request.headers.get("authorization"))
        except AuthError as error:
            self._metrics.request_refused("unauthorized")
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, str(error), code="invalid_api_key", headers=headers) from None

    def check_origin(self, request: Request) -> None:
        """403 for what a page of another origin makes a browser send. Without keys a server on loopback is open to
        all programs of this machine, but must not be to all web sites that its user looks at: neither directly nor
        through a name that was made to resolve to 127.0.0.1."""
        if self.keys is not None or not self._settings.loopback:
            return
        host = _host_name(request.headers.get("host", ""))
        origin = request.headers.get("origin")
        if host and not is_loopback(host):
            message = f"this server has no API keys, so it answers to its loopback address only, not to {host[:100]!r}"
            raise ApiError(403, message, code="wrong_host")
        if origin and not is_loopback(_host_name(origin.partition("://")[2])):
            raise ApiError(403, "requests of web pages of other origins are not answered", code="wrong_origin")

    @contextmanager
    def charged(self, key: Key) -> Iterator[None]:
        """Around all that is done for a request: it counts against its key's rate, whatever comes of it, unless it is
        refused for want of room (429, 503). Raises ApiError 429."""
        self._charge(key, 0, requests=1)
        try:
            yield
        except Exception as error:
            if _is_refusal(error):
                self.rates.charge(key, requests=-1)
            raise

    def _charge(self, key: Key, tokens: int, *, requests: int) -> None:
        verdict = self.rates.allow(key, tokens, requests=requests)
        if not verdict.allowed:
            self._metrics.request_refused("rate_limit")
            raise ApiError(429, verdict.reason, code="rate_limit_exceeded", headers=verdict.headers)

    @contextmanager
    def place(self, key: Key, answers: int = 1) -> Iterator[None]:
        """Around the making of a prompt, and so many answers to it. Raises ApiError 429, and 400 for more answers than
        the key can ever have at a time."""
        if key.streams is not None and answers > key.streams:
            raise bad_request(f"{answers} answers at once; the API key {key.name} is limited to {key.streams}", "n")
        verdict = self.streams.enter(key, answers)
        if not verdict.allowed:
            self._metrics.request_refused("streams")
            raise ApiError(429, verdict.reason, code="too_many_streams", headers=verdict.headers)
        try:
            yield
        finally:
            self.streams.leave(key, answers)

    @asynccontextmanager
    async def admitted(self, record: Record) -> AsyncGenerator[Record, None]:
        """Around the computing for a request: charges its prompt, and writes its beginning and its end down.
        Raises ApiError 429, and 503 when the audit log cannot be written."""
        self._charge(record.key, record.prompt_tokens, requests=0)
        try:
            async with self._written_down(record):
                yield record
        except Exception as error:
            if _is_refusal(error):
                self.rates.charge(record.key, -record.prompt_tokens)
            raise

    @asynccontextmanager
    async def _written_down(self, record: Record) -> AsyncGenerator[None, None]:
        try:
            await self._write("request", record)
            yield
        except AuditError:
            self._metrics.request_refused("audit")
            raise
        except (GeneratorExit, asyncio.CancelledError, HungUp):
            record.outcome = "cancelled"
            await self._end(record)
            raise
        except Exception as error:
            if isinstance(error, Overloaded):
                self._metrics.request_refused("overloaded")
            record.outcome = f"error {_name_of(error)}"
            await self._end(record)
            raise
        else:
            await self._end(record)

    async def _end(self, record: Record) -> None:
        """An answer whose end cannot be written down is not taken back: its beginning is in the log."""
        self.rates.charge(record.key, record.completion_tokens)
        try:
            await self._write("response", record)
        except AuditError as error:
            logger.error("the end of an answer is missing in the audit log: %s", error)

    async def _write(self, event: str, record: Record) -> None:
        if self.audit is None:
            return
        fields: dict[str, Any] = {
            "key": record.key.name,
            "route": record.route,
            "model": record.model,
            "model_digest": self._settings.model_digest,
            "prompt_tokens": record.prompt_tokens,
        }
        if event == "response":
            fields |= {"completion_tokens": record.completion_tokens, "outcome": record.outcome or "done"}
            fields["seconds"] = round(time.perf_counter() - record.started, 3)
        # Shielded: a client that leaves does not take the record along.
        write = asyncio.to_thread(self.audit.append, event, record.content, **fields)
        await asyncio.shield(asyncio.ensure_future(write))


def _host_name(host: str) -> str:
    """'[::1]:8000' -> '::1', 'localhost:8000' -> 'localhost'."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition("/")[0].rpartition(":")[0] or host.partition("/")[0]


def _is_refusal(error: Exception) -> bool:
    """Whether the request was turned away, and may come again."""
    if isinstance(error, ApiError):
        return error.status in (429, 503)
    return isinstance(error, (Overloaded, AuditError, RankFailed))


def _name_of(error: Exception) -> str:
    if isinstance(error, RankFailed):
        return "engine_failed"
    if isinstance(error, MultitensorError):
        found = to_api_error(error)
        return found.code or str(found.status)
    return "internal_error"
