"""Threads in which bodies are checked and prompts made: templates and tokenizing take milliseconds to seconds, and must
never be done in the event loop, where all answers flow."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from multitensor.engine.fair_queue import FairQueue

Result = TypeVar("Result")


@dataclass(eq=False)
class _Turn:
    key: str
    granted: asyncio.Future[None]


class PromptThreads:
    """For one event loop. Keys take turns, and no key has all threads, so that one is always left for the others."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prompt")
        self._free = threads
        self._most = max(threads - 1, 1)  # of one key
        self._waiting: FairQueue[_Turn] = FairQueue()
        self._running: Counter[str] = Counter()

    def close(self) -> None:
        """What runs is not waited for; what waits is cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, key: str, work: Callable[..., Result], *arguments: Any) -> Result:
        """What the work returns or raises. A caller that is cancelled leaves it behind to end by itself."""
        loop = asyncio.get_running_loop()
        turn = _Turn(key, loop.create_future())
        self._waiting.push(turn)
        self._grant()
        try:
            await turn.granted
        except asyncio.CancelledError:
            if turn.granted.cancelled():
                self._waiting.remove(turn)
            else:
                self._ended(key)
            raise

        def ended(_: Future[Result]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._ended, key)

        try:
            future = self._pool.submit(work, *arguments)
        except RuntimeError:  # closed
            self._ended(key)
            raise
        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    def _grant(self) -> None:
        while self._free:
            turn = next((head for head in self._waiting.heads() if self._running[head.key] < self._most), None)
            if turn is None:
                return
            self._waiting.take(turn)
            self._free -= 1
            self._running[turn.key] += 1
            if not turn.granted.done():
                turn.granted.set_result(None)

    def _ended(self, key: str) -> None:
        self._free += 1
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        self._grant()
