"""Threads in which prompts are made: keys take turns, and one is left for the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from multitensor.server.prompt_threads import PromptThreads


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


def test_a_key_that_floods_the_threads_delays_no_other() -> None:
    async def test() -> None:
        threads, gate = PromptThreads(3), threading.Event()
        flood = [asyncio.ensure_future(threads.run("a", gate.wait)) for _ in range(20)]
        await asyncio.sleep(0)
        assert await threads.run("b", sum, [1, 2]) == 3
        assert await threads.run("c", sum, [1, 3]) == 4
        assert not any(task.done() for task in flood)
        gate.set()
        assert await asyncio.gather(*flood) == [True] * 20
        threads.close()

    run(test())


def test_keys_take_turns() -> None:
    async def test() -> None:
        threads, gate = PromptThreads(1), threading.Event()
        order: list[str] = []
        first = asyncio.ensure_future(threads.run("a", gate.wait))
        await asyncio.sleep(0)
        others = [asyncio.ensure_future(threads.run(key, order.append, key)) for key in "aaabbc"]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *others)
        assert "".join(order) == "abcaba"
        threads.close()

    run(test())


def test_whoever_leaves_or_fails_keeps_no_thread() -> None:
    async def test() -> None:
        threads, gate = PromptThreads(1), threading.Event()
        tasks = [asyncio.ensure_future(threads.run("a", gate.wait)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gate.set()
        with pytest.raises(ZeroDivisionError):
            await threads.run("b", lambda: 1 // 0)
        assert await threads.run("a", sum, [1, 2]) == 3
        threads.close()

    run(test())
