"""Figures of a running engine, as its server shows them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

RATE_SECONDS = 10.0  # tokens a second are counted over so long


@dataclass(frozen=True)
class EngineSnapshot:
    """Where the engine stands, and totals since it was started (they outlive a restart of the ranks).

    running, waiting: sequences. kv_used, kv_total: tokens of the pool; blocks kept for reuse alone count as free.
    prefix_queries, prefix_hits: prompt tokens looked up, and those found in the cache. prompt_tokens: computed.
    memory: per rank, as measured when it was last asked for. restarts: how often the ranks were started again.
    compute_seconds, reduction_seconds: per rank, None where the ranks do not measure them.
    """

    ready: bool
    failure: str | None
    running: int
    waiting: int
    kv_used: int
    kv_total: int
    prefix_hits: int
    prefix_queries: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    preemptions: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    restarts: int
    memory: tuple[dict[str, int], ...]
    compute_seconds: tuple[float, ...] | None = None
    reduction_seconds: tuple[float, ...] | None = None


class TokenRate:
    """Tokens a second over the last RATE_SECONDS. Counted by one thread, read by another."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque(maxlen=100)  # of a tenth of the window each, about

    def count(self, tokens: int) -> None:
        now = time.monotonic()
        counts = self._counts
        if counts and now - counts[-1][0] < RATE_SECONDS / 100:
            counts[-1] = (counts[-1][0], counts[-1][1] + tokens)
        else:
            counts.append((now, tokens))

    def read(self) -> float:
        now = time.monotonic()
        recent = [(at, tokens) for at, tokens in list(self._counts) if now - at < RATE_SECONDS]
        if not recent:
            return 0.0
        return sum(tokens for _, tokens in recent) / max(now - recent[0][0], 0.5)
