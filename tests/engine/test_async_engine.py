"""The engine behind an event loop: streams, cancellation, admission, a rank's death and the start after it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import numpy as np
import pytest
from fake_ranks import FakeExecutor, hidden_state, make_engine, oracle

from multitensor.engine.async_engine import AsyncEngine
from multitensor.engine.engine import Engine
from multitensor.engine.request import RequestOutput, SamplingParams
from multitensor.errors import InputError, Overloaded, RankFailed, ShuttingDown

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


class Opener:
    """Opens engines over fake ranks. A step takes `seconds`. failures: raised, one by one, instead of opening."""

    def __init__(self, seconds: float = 0.0, **sizes: Any) -> None:
        self.seconds = seconds
        self.sizes = sizes
        self.failures: list[Exception] = []
        self.executors: list[FakeExecutor] = []

    def __call__(self) -> Engine:
        if self.failures:
            raise self.failures.pop(0)
        engine, executor = make_engine(**self.sizes)
        executor.on_submit = lambda step: time.sleep(self.seconds)
        self.executors.append(executor)
        return engine


def run(test: Callable[[AsyncEngine, Opener], Coroutine[Any, Any, None]], opener: Opener, **settings: Any) -> None:
    async def main() -> None:
        engine = AsyncEngine(opener, **settings)
        await engine.start()
        try:
            await asyncio.wait_for(test(engine, opener), 15)
        finally:
            await engine.stop()
        assert all(executor.closed == 1 for executor in opener.executors)

    asyncio.run(main())


async def read(stream: Any) -> list[RequestOutput]:
    return [output async for output in stream]


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


def test_streams_give_everything_once_and_in_order() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        assert engine.ready and engine.failure is None and engine.context == 64
        prompts = [[1 + i, 2, 3 + i] for i in range(12)]
        results = await asyncio.gather(*(read(engine.generate(prompt, GREEDY)) for prompt in prompts))
        for prompt, outputs in zip(prompts, results, strict=True):
            final = outputs[-1].outputs[0]
            assert final.token_ids == oracle(prompt, GREEDY, context=64)[0]
            assert "".join(output.delta for output in outputs) == final.text
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        stats = engine.stats()
        assert not engine.given_up
        assert (stats.running, stats.waiting, stats.kv_used, stats.kv_total) == (0, 0, 0, 256)
        assert stats.generated_tokens == 12 * 20 and stats.tokens_per_second > 0 and stats.ready
        assert (stats.compute_seconds, stats.reduction_seconds) == ((0.5,), (0.25,))

    run(test, Opener())


def test_a_slow_reader_finds_the_outputs_merged() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, n=2)
        stream = engine.generate([1, 2], params)
        first = await anext(stream)
        await until(lambda: engine.stats().running == 0)
        await asyncio.sleep(0.05)
        rest = await read(stream)
        assert len(rest) == 1 and rest[0].finished
        for i in range(2):
            assert first.outputs[i].delta + rest[0].outputs[i].delta == rest[0].outputs[i].text

    run(test, Opener(seconds=0.002))


@pytest.mark.parametrize("how", ["aclose", "drop", "task", "with"])
def test_who_leaves_frees_the_place(how: str) -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        stream = engine.generate([1, 2], LONG)
        await anext(stream)
        if how == "aclose":
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        elif how == "drop":
            del stream
        elif how == "with":
            async with stream:
                await anext(stream)
        else:
            task = asyncio.create_task(read(stream))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: engine.stats().running == 0)
        assert (await read(engine.generate([5], GREEDY)))[-1].outputs[0].token_ids == oracle([5], GREEDY, context=64)[0]
        assert not engine._channels and not engine._served
        assert len(opener.executors[0].steps) < 200

    run(test, Opener(seconds=0.005, context=4000, n_blocks=1000))


def test_a_request_that_was_never_read_is_cancelled_too() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        engine.generate([1, 2], LONG)
        await until(lambda: not engine._channels)
        assert engine.stats().running == 0

    run(test, Opener(seconds=0.005, context=4000, n_blocks=1000))


def test_wrong_input_is_refused_at_once() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        for ids in ([], [1000], [1] * 64):
            with pytest.raises(InputError):
                engine.generate(ids, GREEDY)
        with pytest.raises(InputError, match="vocabulary"):
            engine.generate([1], SamplingParams(stop_token_ids=[1000]))
        stream = engine.generate([1], GREEDY)
        await stream.admitted()
        await read(stream)

    run(test, Opener())


def test_too_many_waiting_are_refused_and_later_let_in() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        running = [engine.generate([1 + i], LONG) for i in range(2)]
        for stream in running:
            await anext(stream)
        waiting = [engine.generate([9], GREEDY, key="a"), engine.generate([8], GREEDY, key="a")]
        with pytest.raises(Overloaded, match="key"):
            engine.generate([7], GREEDY, key="a")
        waiting.append(engine.generate([7], GREEDY, key="b"))
        with pytest.raises(Overloaded, match="3 requests wait"):
            engine.generate([6], GREEDY, key="c")
        assert engine.stats().waiting == 3
        for stream in running:
            await stream.aclose()
        for prompt, stream in zip((9, 8, 7), waiting, strict=True):
            assert (await read(stream))[-1].outputs[0].token_ids == oracle([prompt], GREEDY, context=64)[0]
        await read(engine.generate([6], GREEDY, key="c"))

    opener = Opener(seconds=0.002, context=4000, n_blocks=2000, max_num_seqs=2)
    run(test, opener, max_waiting=3, max_waiting_per_key=2)


def test_prompts_that_are_asked_at_once_count_as_one_that_waits() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        first, second = object(), object()
        streams = [engine.generate([1 + i], LONG, group=first) for i in range(5)]
        streams += [engine.generate([1 + i], LONG, group=second) for i in range(5)]
        for group in (None, object()):
            with pytest.raises(Overloaded, match="2 requests wait"):
                engine.generate([9], LONG, group=group)
        streams.append(engine.generate([6], LONG, group=first))
        for stream in streams:
            stream.cancel()

    run(test, Opener(seconds=0.01, context=4000, n_blocks=2000, max_num_seqs=1), max_waiting=2)


@pytest.mark.parametrize("idle", [False, True])
def test_a_lost_rank_answers_all_and_is_replaced(idle: bool) -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        await read(engine.generate([3], GREEDY))
        opener.failures = [RankFailed("no memory yet")]
        streams = [] if idle else [engine.generate([1 + i], LONG) for i in range(9)]
        for stream in streams[:4]:
            await anext(stream)
        ranks = opener.executors[0]
        ranks.lost, ranks.fail_at = True, len(ranks.steps) + 1
        for stream in streams:
            with pytest.raises(RankFailed, match="killed"):
                await asyncio.wait_for(read(stream), 2.0)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        await until(lambda: not engine.ready, 1.0)
        with pytest.raises(RankFailed):
            engine.generate([1], GREEDY)
        with pytest.raises(RankFailed):
            await engine.memory()
        assert engine.failure is not None
        await until(lambda: engine.ready)
        assert engine.failure is None and len(opener.executors) == 2 and ranks.closed == 1
        assert (await read(engine.generate([3], GREEDY)))[-1].outputs[0].token_ids == oracle([3], GREEDY, context=64)[0]
        stats = engine.stats()
        assert stats.restarts == 1 and stats.generated_tokens >= 40

    run(test, Opener(seconds=0.002, context=4000, n_blocks=1000), backoff=0.05)


def test_it_gives_up_when_the_ranks_cannot_be_started_again() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        opener.failures = [RankFailed(f"gone {i}") for i in range(10)]
        opener.executors[0].lost = True
        await until(lambda: not engine._thread.alive)
        assert engine.given_up
        assert len(opener.failures) == 7 and engine.failure == "gone 2" and not engine.ready
        with pytest.raises(RankFailed, match="gone 2"):
            engine.generate([1], GREEDY)

    run(test, Opener(), backoff=0.01, restart_attempts=3)


def test_a_start_that_fails_says_why() -> None:
    async def main() -> None:
        opener = Opener()
        opener.failures = [InputError("no such file")]
        engine = AsyncEngine(opener)
        with pytest.raises(InputError, match="no such file"):
            await engine.start()
        assert not engine.ready
        await engine.stop()

    asyncio.run(main())


def test_draining_lets_the_running_finish_and_ends_the_rest() -> None:
    async def main() -> None:
        engine = AsyncEngine(Opener(seconds=0.005, context=40000, n_blocks=10000))
        await engine.start()
        short, endless = engine.generate([1], GREEDY), engine.generate([2], LONG)
        tasks = [asyncio.create_task(read(short)), asyncio.create_task(read(endless))]
        await asyncio.sleep(0.02)
        stopping = asyncio.create_task(engine.stop(drain_seconds=1.0))
        await asyncio.sleep(0.01)
        with pytest.raises(ShuttingDown, match="shutting down"):
            engine.generate([1], GREEDY)
        assert (await tasks[0])[-1].finished
        with pytest.raises(RankFailed, match="stopped"):
            await tasks[1]
        await stopping

    asyncio.run(main())


def test_requests_can_be_ended_while_the_ranks_live_on() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        stream = engine.generate([2], LONG)
        await anext(stream)
        embedding = asyncio.create_task(engine.embed([3] * 30000))
        await asyncio.sleep(0.02)
        engine.end_requests()
        for what in (read(stream), embedding):
            with pytest.raises(ShuttingDown):
                await what
        await until(lambda: engine.stats().running == engine.stats().waiting == 0)
        assert not engine.ready and not engine.given_up and opener.executors[0].closed == 0

    run(test, Opener(seconds=0.005, context=40000, n_blocks=10000))


def test_calls_between_steps() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        stream = engine.generate([1, 2], GREEDY)
        await anext(stream)
        assert await engine.memory() == [("memory", {})]
        assert (await read(stream))[-1].finished

    run(test, Opener())


def test_embeddings_beside_streams() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        stream = engine.generate([1, 2], LONG)
        await anext(stream)
        texts = [[i + 1] * (i + 3) for i in range(9)]
        for ids, vector in zip(texts, await asyncio.gather(*map(engine.embed, texts)), strict=True):
            total = np.sum([hidden_state(ids[: i + 1]) for i in range(len(ids))], axis=0, dtype=np.float64)
            assert np.allclose(vector, total / np.linalg.norm(total))
        with pytest.raises(InputError):
            await engine.embed([1000])
        task = asyncio.create_task(engine.embed([3] * 3000))
        await until(lambda: bool(engine._embedding))
        task.cancel()
        await until(lambda: not engine._embedding and engine.stats().running == 1)
        task = asyncio.create_task(engine.embed([3] * 3000))
        await until(lambda: bool(engine._embedding))
        opener.executors[0].fail_at = len(opener.executors[0].steps) + 1
        with pytest.raises(RankFailed, match="killed"):
            await task
        await until(lambda: not engine._embedding)

    run(test, Opener(seconds=0.002, context=4000, n_blocks=2000), max_waiting=4, backoff=0.05)


def test_a_crowd_of_which_half_hangs_up_loses_and_crosses_nothing() -> None:
    async def test(engine: AsyncEngine, opener: Opener) -> None:
        random = Random(5)
        common = [3] * 9

        async def one(number: int) -> bool:
            prompt = [*common[: random.randrange(9)], number % 30 + 1, number // 30 + 1]
            params = SamplingParams(temperature=0.0, max_tokens=random.randrange(4, 24), ignore_eos=True)
            leaves_after = random.randrange(1, 8) if random.random() < 0.5 else None
            wanted = oracle(prompt, params, context=64)[0]
            text, seen = "", 0
            async with engine.generate(prompt, params, key=str(number % 7)) as stream:
                async for output in stream:
                    ids = output.outputs[0].token_ids
                    text += output.delta
                    assert ids == wanted[: len(ids)] and len(ids) > seen
                    seen = len(ids)
                    if leaves_after is not None and seen >= leaves_after:
                        return False
            assert ids == wanted and text == output.outputs[0].text
            return True

        finished = await asyncio.gather(*map(one, range(400)))
        assert 100 < sum(finished) < 300
        await until(lambda: engine.stats().running == 0 and not engine._channels and not engine._served)
        assert engine.stats().kv_used == 0 and engine.stats().waiting == 0
        assert engine.stats().prefix_hits > 0

    run(test, Opener(max_num_seqs=16, n_blocks=70, max_batch_tokens=24, block_size=4), max_waiting=1000)
