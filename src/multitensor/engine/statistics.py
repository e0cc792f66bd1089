"""Figures of a running engine, as its server shows them, and of its start."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass

RATE_SECONDS = 10.0  # tokens a second are counted over so long

RankSeconds = tuple[tuple[float, float | None], ...]  # by rank: computing, in reductions (None: not measured)


@dataclass
class EngineStats:
    """Totals since the start. A step with prompt (or scored) tokens counts as prefill, any other as decode, so the
    decode rate is not blurred by prefill that shares a step; seconds are from one result to the next."""

    steps: int = 0
    preemptions: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    generated_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens that were looked up in the cache
    prefix_hits: int = 0  # and of these, those found there
    rank_seconds: RankSeconds = ()

    @property
    def prefill_tokens_per_second(self) -> float | None:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else None


@dataclass(frozen=True)
class EngineLoad:
    """Sequences that hold a slot, and that wait; tokens of the pool in use, tokens that are only kept for reuse (they
    count as free), and all."""

    running: int
    waiting: int
    kv_used: int
    kv_cached: int
    kv_total: int


@dataclass(frozen=True)
class EngineSnapshot:
    """Where the engine stands, and totals since it was started (they outlive a restart of the ranks).

    running, waiting: sequences. kv_used, kv_total: tokens of the pool; kv_cached: tokens only kept for reuse, which
    count as free. prefix_queries, prefix_hits: prompt tokens looked up, and those found in the cache. prompt_tokens:
    computed.
    memory: per rank, as measured when it was last asked for. restarts: how often the ranks were started again.
    compute_seconds, reduction_seconds: per rank, None where the ranks do not measure them (GPU ranks measure steps as
    a whole: that is compute, reductions included).
    """

    ready: bool
    failure: str | None
    running: int
    waiting: int
    kv_used: int
    kv_cached: int
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


def add_seconds(past: RankSeconds, now: RankSeconds) -> RankSeconds:
    """By rank, of ranks that were restarted meanwhile; either may be empty."""
    if not past or not now:
        return past or now
    pairs = zip(past, now, strict=True)
    return tuple((a + c, None if b is None or d is None else b + d) for (a, b), (c, d) in pairs)


class Totals:
    """Counts of one engine after another: a rank's death ends an engine, and what it counted is kept."""

    _NAMES = (
        "steps",
        "preemptions",
        "prefill_tokens",
        "generated_tokens",
        "prefix_hits",
        "prefix_queries",
        "prefill_seconds",
        "decode_seconds",
    )

    def __init__(self) -> None:
        self._past = dict.fromkeys(self._NAMES, 0.0)
        self._past_seconds: RankSeconds = ()

    def keep(self, ended: EngineStats) -> None:
        """Of an engine that was closed."""
        self._past = self.counts(ended)
        self._past_seconds = self.seconds(ended)

    def counts(self, now: EngineStats | None) -> dict[str, float]:
        """By name, those of the engine at work included; None: there is none."""
        return {name: self._past[name] + (getattr(now, name) if now else 0) for name in self._NAMES}

    def seconds(self, now: EngineStats | None) -> RankSeconds:
        return add_seconds(self._past_seconds, now.rank_seconds if now else ())


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


def seconds_since_start() -> float:
    """Age of this process, so that what a user waits for counts from the command on: imports too. To 10 ms."""
    try:
        with open("/proc/self/stat") as file:
            # Field 22, in ticks since boot; the name in field 2 may hold blanks.
            started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError):
        import psutil

        return time.time() - float(psutil.Process().create_time())


class Stages:
    """Seconds of stages that follow one another in a rank's start. "start": what came before, from its process's
    beginning: interpreter, torch, device, joining the others (for a rank that is a thread, its process's whole age)."""

    def __init__(self) -> None:
        self.seconds = {"start": seconds_since_start()}
        self._last = time.perf_counter()

    def end(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
