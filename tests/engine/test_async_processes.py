"""The engine of a server over real rank processes and a real model: a rank is killed, a conversation goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from multitensor.engine.async_engine import AsyncEngine
from multitensor.engine.open_engine import engine_opener
from multitensor.engine.request import SamplingParams
from multitensor.errors import RankFailed

pytestmark = [pytest.mark.processes, pytest.mark.models]

PROMPT = "The tide comes in twice a day, and the harbour"


def rank_processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "multitensor.engine.worker" in " ".join(child.cmdline())]


async def timed(engine: AsyncEngine, ids: list[int], tokens: int) -> tuple[list[int], float]:
    """The answer's ids, and the seconds to its first token."""
    began = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    stream = engine.generate(ids, params)
    outputs = [await anext(stream)]
    first = time.perf_counter() - began
    outputs += [output async for output in stream]
    return outputs[-1].outputs[0].token_ids, first


def test_a_killed_rank_is_replaced_and_the_next_answer_is_the_same(smollm2_path: Path) -> None:
    opener = engine_opener(smollm2_path, devices="cpu:2", max_model_len=256, dtype="float32")

    async def main() -> None:
        engine = AsyncEngine(opener, backoff=0.05)
        await engine.start()
        try:
            ids = engine.tokenizer.encode(PROMPT, bos=True)
            wanted, _ = await timed(engine, ids, 12)
            for busy in (True, False):
                ranks = rank_processes()
                assert len(ranks) == 2
                endless = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
                streams = [engine.generate(ids[: 3 + i], endless) for i in range(6)] if busy else []
                for stream in streams:
                    await anext(stream)
                os.kill(ranks[1].pid, signal.SIGKILL)
                killed = time.perf_counter()
                for stream in streams:
                    with pytest.raises(RankFailed, match="SIGKILL"):
                        async for _ in stream:
                            pass
                while engine.ready:
                    await asyncio.sleep(0.01)
                assert time.perf_counter() - killed < 2.0
                while not engine.ready:
                    await asyncio.sleep(0.05)
                assert (await timed(engine, ids, 12))[0] == wanted
                assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
            stats = engine.stats()
            assert stats.restarts == 2 and len(stats.memory) == 2 and stats.memory[0]["weights_bytes"] > 10_000_000
        finally:
            await engine.stop()
        assert not rank_processes()

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_stopped_rank_is_told_within_the_limit_and_replaced(smollm2_path: Path) -> None:
    opener = engine_opener(smollm2_path, devices="cpu:2", max_model_len=256, dtype="float32", step_timeout=2.0)

    async def main() -> None:
        engine = AsyncEngine(opener, backoff=0.05)
        await engine.start()
        try:
            ids = engine.tokenizer.encode(PROMPT, bos=True)
            wanted, _ = await timed(engine, ids, 12)
            ranks = rank_processes()
            endless = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
            streams = [engine.generate(ids[: 3 + i], endless) for i in range(6)]
            for stream in streams:
                await anext(stream)
            os.kill(ranks[1].pid, signal.SIGSTOP)
            stopped = time.perf_counter()
            late = engine.generate(ids, endless)  # comes while nothing moves
            for stream in [*streams, late]:
                with pytest.raises(RankFailed, match=rf"process {ranks[1].pid}, is stopped"):
                    async for _ in stream:
                        pass
            assert 1.9 < time.perf_counter() - stopped < 4.0
            assert not engine.ready
            while not engine.ready:
                await asyncio.sleep(0.05)
            assert (await timed(engine, ids, 12))[0] == wanted
            assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
            assert engine.stats().restarts == 1
        finally:
            await engine.stop()
        assert not rank_processes()

    asyncio.run(asyncio.wait_for(main(), 120))


def test_the_second_turn_starts_at_once(smollm2_path: Path) -> None:
    opener = engine_opener(smollm2_path, devices="cpu:1", max_model_len=2048)

    async def main() -> None:
        engine = AsyncEngine(opener)
        await engine.start()
        try:
            words = engine.tokenizer.encode(" ".join(f"{PROMPT} was {i} fathoms deep." for i in range(200)))
            history = words[:1500]
            answer, cold = await timed(engine, history, 8)
            again = history + answer + engine.tokenizer.encode(" And then?")
            found, warm = await timed(engine, again, 8)
            assert engine.stats().prefix_hits >= 1472
            assert cold > 5 * warm, f"{cold:.2f} s cold, {warm:.2f} s with its beginning known"
            vector = await engine.embed(history[:50])
            assert len(vector) == 576 and sum(value * value for value in vector) == pytest.approx(1.0)
            assert len(found) == 8
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(main(), 120))
