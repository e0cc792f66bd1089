"""What one API key may take: requests and tokens a minute, requests at once."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from multitensor.server.auth import Key


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

    A prompt is charged when it comes, the tokens made for it when they are known (`charge`). What exceeds a whole
    minute's limit goes through when the minute is unused, and is then waited for: on average the limit holds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def allow(self, key: Key, tokens: int = 0) -> Verdict:
        """Charges one request with `tokens` prompt tokens, or charges nothing and says why not."""
        with self._lock:
            wanted = [
                (self._bucket(key, kind, limit), kind, limit, amount)
                for kind, limit, amount in (
                    ("requests", key.requests_per_minute, 1),
                    ("tokens", key.tokens_per_minute, max(tokens, 1)),
                )
                if limit is not None
            ]
            waits = [(bucket.wait(amount), kind, limit) for bucket, kind, limit, amount in wanted]
            longest, kind, limit = max(waits, default=(0.0, "", 0))
            if longest > 0:
                reason = f"the API key {key.name} is limited to {limit} {kind} a minute; try again in {longest:.1f} s"
                return Verdict(False, reason, longest)
            for bucket, kind, _, amount in wanted:
                bucket.level -= tokens if kind == "tokens" else amount
            return ALLOWED

    def charge(self, key: Key, tokens: int) -> None:
        """Takes tokens that were made already."""
        if key.tokens_per_minute is not None:
            with self._lock:
                self._bucket(key, "tokens", key.tokens_per_minute).level -= tokens

    def _bucket(self, key: Key, kind: str, limit: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.get((key.name, kind))
        if bucket is None or bucket.capacity != limit:  # new, or the key's limit was changed in the file
            bucket = self._buckets[key.name, kind] = _Bucket(limit, limit, now)
        bucket.fill(now)
        return bucket


class StreamLimiter:
    """Requests under way at the same time: of one key, and of all together. For any number of threads."""

    def __init__(self, total: int | None = None) -> None:
        self._total = total
        self._lock = threading.Lock()
        self._active: Counter[str] = Counter()

    @property
    def active(self) -> int:
        with self._lock:
            return self._active.total()

    def enter(self, key: Key) -> Verdict:
        """Counts one in, if there is room; then `leave` must follow."""
        with self._lock:
            if key.streams is not None and self._active[key.name] >= key.streams:
                return Verdict(False, f"the API key {key.name} is limited to {key.streams} requests at a time", 1.0)
            if self._total is not None and self._active.total() >= self._total:
                return Verdict(False, f"the server answers {self._total} requests already, its limit; try later", 1.0)
            self._active[key.name] += 1
            return ALLOWED

    def leave(self, key: Key) -> None:
        with self._lock:
            self._active[key.name] -= 1
            if self._active[key.name] <= 0:
                del self._active[key.name]
