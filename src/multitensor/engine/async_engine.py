"""The engine for many tasks of one event loop: it runs on a thread of its own, and is opened again when a rank dies.

The thread takes commands (a new request, a cancellation, a call) between steps, and hands the news of a step to the
event loop in one callback. Nothing of the engine is touched by the event loop but numbers for statistics.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from multitensor.config import EngineConfig
from multitensor.engine.engine import Engine
from multitensor.engine.request import RequestOutput, SamplingParams
from multitensor.engine.request_state import EmbedRequest, Request
from multitensor.engine.request_stream import RequestChannel, RequestStream
from multitensor.engine.statistics import EngineSnapshot, TokenRate, Totals
from multitensor.errors import Overloaded, RankFailed
from multitensor.sharding.plan import Plan

logger = logging.getLogger(__name__)

HEALTH_SECONDS = 0.2  # how often an idle engine looks whether its ranks are alive
STOP_SECONDS = 30.0
STABLE_SECONDS = 60.0  # ranks that lived so long do not count as failing again and again

News = list[tuple[RequestChannel, RequestOutput]]


@dataclass(frozen=True)
class _Command:
    """For the engine's thread: done between steps, or refused when there is no engine."""

    run: Callable[[Engine], None]
    refuse: Callable[[Exception], None]


class AsyncEngine:
    """open_engine: starts the ranks and returns the engine over them; called in the engine's thread, and again after a
    rank's death. max_waiting: requests that may wait for their first step; one more is refused.
    max_waiting_per_key: the same for one key. restart_attempts: how often in a row opening may fail before it is given
    up. backoff: seconds before the first attempt, doubled each time, 30 at most."""

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        *,
        max_waiting: int = 256,
        max_waiting_per_key: int | None = None,
        restart_attempts: int = 6,
        backoff: float = 0.5,
    ) -> None:
        self.max_waiting = max_waiting
        self.max_waiting_per_key = max_waiting_per_key
        self.failure: str | None = None
        self._open_engine = open_engine
        self._restart_attempts = restart_attempts
        self._backoff = backoff
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()  # None only wakes the thread
        self._engine: Engine | None = None
        self._latest: Engine | None = None  # the one above, or the one before it while there is none
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._channels: set[RequestChannel] = set()  # the event loop's; those that have not ended
        self._served: dict[Request, RequestChannel] = {}  # the thread's
        self._embedding: dict[EmbedRequest, asyncio.Future[list[float]]] = {}  # the thread's
        self._embeds = asyncio.Semaphore(max_waiting)
        self._calls: set[asyncio.Future[Any]] = set()
        self._draining = False
        self._abandon = threading.Event()
        self._restarts = 0
        self._memory: tuple[dict[str, int], ...] = ()
        self._totals = Totals()
        self._rate = TokenRate()

    # --- its life ---

    async def start(self) -> None:
        """Returns when the model is ready; raises what opening it raised."""
        if self._thread is not None:
            raise RuntimeError("this engine has been started before")
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="engine", daemon=True)
        self._thread.start()
        await opened

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Takes no more requests, gives those under way `drain_seconds`, then ends them (RankFailed) and the ranks."""
        self._draining = True
        if self._thread is None:
            return
        deadline = time.monotonic() + drain_seconds
        while (self._channels or self._calls) and time.monotonic() < deadline and self._thread.is_alive():
            await asyncio.sleep(0.02)
        self._abandon.set()
        self._commands.put(None)
        # Loading cannot be interrupted; ranks that are still being started then end with the process.
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    @property
    def ready(self) -> bool:
        """Whether a request would be taken up (unless too many wait)."""
        return self._engine is not None and not self._draining

    @property
    def given_up(self) -> bool:
        """The ranks could not be started again; only a new process can help. `failure` says why."""
        return self._thread is not None and not self._thread.is_alive() and not self._abandon.is_set()

    @property
    def plan(self) -> Plan:
        return self._known.plan

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._known.context

    @property
    def tokenizer(self) -> Any:
        """formats.tokenizer.Tokenizer, or None where the model's files carry none."""
        return self._known.tokenizer

    @property
    def config(self) -> EngineConfig:
        return self._known.config

    @property
    def _known(self) -> Engine:
        if self._latest is None:
            raise RuntimeError("the engine has not been started")
        return self._latest

    # --- requests ---

    def generate(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        key: str = "",
        grammar: Any = None,
        prompt: str | None = None,
    ) -> RequestStream:
        """Queues a request. key: whose it is; keys take turns. grammar: engine.grammar.GrammarSpec.
        Raises InputError, Overloaded, or RankFailed while the ranks are being started again, all at once; the stream
        raises RankFailed when a rank dies meanwhile."""
        self._admit(key)
        ids = self._known.check_prompt(prompt_ids)
        self._known.check_params(params)
        channel = RequestChannel(key)
        options: dict[str, Any] = {"prompt": prompt, "key": key}
        if grammar is not None:
            options["grammar"] = grammar

        def add(engine: Engine) -> None:
            if channel.cancelled:
                return
            channel.request = engine.add_request(ids, params, **options)
            self._served[channel.request] = channel
            self._post(channel.admit)

        self._channels.add(channel)
        self._commands.put(_Command(add, lambda error: self._post(self._fail, [channel], error)))
        return RequestStream(channel, self._cancel)

    async def embed(self, ids: SequenceOf[int], *, key: str = "") -> list[float]:
        """The mean of the text's last hidden states, of length 1; [hidden]. At most max_waiting are queued at once, the
        others wait here. Raises InputError, Overloaded, RankFailed."""
        async with self._embeds:
            self._require_ready()
            checked = self._known.check_prompt(ids, room=0)
            assert self._loop is not None
            future: asyncio.Future[list[float]] = self._loop.create_future()
            added: list[EmbedRequest] = []

            def add(engine: Engine) -> None:
                added.append(engine.add_embed(checked, key=key))
                self._embedding[added[0]] = future

            def cancel(engine: Engine) -> None:
                if added and self._embedding.pop(added[0], None) is not None:
                    engine.cancel(added[0])

            return await self._answer(future, add, cancel)

    def compile_grammar(self, spec: Any) -> None:
        """Checks an engine.grammar.GrammarSpec and keeps it compiled, so that `generate` with it does not hold up the
        engine. Any thread; takes up to seconds. Raises InputError."""
        self._known.compile_grammar(spec)

    async def memory(self) -> list[dict[str, int]]:
        """Bytes that each rank holds, measured between steps."""
        measured = await self._between_steps(lambda engine: engine.call("memory"))
        self._memory = tuple(measured)
        return list(measured)

    def _require_ready(self) -> None:
        if self._draining:
            raise Overloaded("the server is shutting down; ask again later")
        if self._engine is None:
            raise RankFailed(self.failure or "the model is not ready")

    def _admit(self, key: str) -> None:
        self._require_ready()
        waiting = [channel for channel in self._channels if channel.waiting]
        if len(waiting) >= self.max_waiting:
            raise Overloaded(f"{len(waiting)} requests wait already; ask again later")
        if self.max_waiting_per_key is not None:
            own = sum(channel.key == key for channel in waiting)
            if own >= self.max_waiting_per_key:
                raise Overloaded(f"{own} requests of this key wait already; ask again later")

    def _cancel(self, channel: RequestChannel) -> None:
        """Any thread; also from a finalizer."""
        if channel.cancelled or channel.ended:
            return
        channel.cancelled = True

        def cancel(engine: Engine) -> None:
            if channel.request is not None and self._served.pop(channel.request, None) is not None:
                engine.cancel(channel.request)
            self._post(self._channels.discard, channel)

        self._commands.put(_Command(cancel, lambda _: self._post(self._channels.discard, channel)))

    async def _between_steps(self, work: Callable[[Engine], Any]) -> Any:
        """Runs it in the engine's thread."""
        self._require_ready()
        assert self._loop is not None
        future: asyncio.Future[Any] = self._loop.create_future()

        def run(engine: Engine) -> None:
            result = work(engine)
            self._post(_resolve, future, result)

        return await self._answer(future, run, lambda engine: None)

    async def _answer(
        self, future: asyncio.Future[Any], run: Callable[[Engine], None], cancel: Callable[[Engine], None]
    ) -> Any:
        """Has the engine's thread run what resolves the future sooner or later, and cancel it if nobody waits."""
        self._calls.add(future)
        try:
            self._commands.put(_Command(run, lambda error: self._post(_reject, future, error)))
            return await future
        except asyncio.CancelledError:
            self._commands.put(_Command(cancel, lambda error: None))
            raise
        finally:
            self._calls.discard(future)

    # --- numbers ---

    def stats(self) -> EngineSnapshot:
        """Counters as they are at this moment; does not wait for the engine."""
        engine = self._known
        load = engine.load()
        current = engine.stats if self._engine else None
        seconds, totals = self._totals.seconds(current), self._totals.counts(current)
        reductions = [reduction for _, reduction in seconds if reduction is not None]
        return EngineSnapshot(
            ready=self.ready,
            failure=self.failure,
            running=load.running if self._engine else 0,
            waiting=sum(channel.waiting for channel in self._channels),
            kv_used=load.kv_used if self._engine else 0,
            kv_cached=load.kv_cached if self._engine else 0,
            kv_total=load.kv_total,
            prefix_hits=int(totals["prefix_hits"]),
            prefix_queries=int(totals["prefix_queries"]),
            prompt_tokens=int(totals["prefill_tokens"]),
            generated_tokens=int(totals["generated_tokens"]),
            steps=int(totals["steps"]),
            preemptions=int(totals["preemptions"]),
            prefill_seconds=totals["prefill_seconds"],
            decode_seconds=totals["decode_seconds"],
            tokens_per_second=self._rate.read(),
            restarts=self._restarts,
            memory=self._memory,
            compute_seconds=tuple(compute for compute, _ in seconds) or None,
            reduction_seconds=tuple(reductions) if seconds and len(reductions) == len(seconds) else None,
        )

    # --- the engine's thread ---

    def _run(self, opened: asyncio.Future[None]) -> None:
        try:
            engine = self._begin()
        except BaseException as error:
            self.failure = _reason(error)
            self._draining = True
            self._post(_reject, opened, error)
            return
        self._post(_resolve, opened, None)
        attempts = 0
        while True:
            since = time.monotonic()
            try:
                self._serve(engine)
            except Exception as error:
                self.failure = _reason(error)
                logger.error("the ranks failed: %s", self.failure, exc_info=not isinstance(error, RankFailed))
            self._end(engine, RankFailed(self.failure or "the engine was stopped before the answer was complete"))
            attempts = 0 if time.monotonic() - since > STABLE_SECONDS else attempts
            again, attempts = self._reopen(attempts)
            if again is None:
                return
            engine = again

    def _begin(self) -> Engine:
        engine = self._open_engine()
        try:
            self._memory = tuple(engine.call("memory"))
        except BaseException:
            engine.close()
            raise
        self._latest = self._engine = engine
        self.failure = None
        return engine

    def _serve(self, engine: Engine) -> None:
        """Until it is told to stop; raises RankFailed."""
        while not self._abandon.is_set():
            for command in self._take(wait=not engine.is_busy):
                try:
                    command.run(engine)
                except RankFailed as error:
                    command.refuse(error)
                    raise
                except Exception as error:
                    command.refuse(error)
            if engine.is_busy:
                before = engine.stats.generated_tokens
                self._deliver(engine.step())
                self._rate.count(engine.stats.generated_tokens - before)
            else:
                engine.check()

    def _take(self, wait: bool) -> Iterator[_Command]:
        """The commands at hand; wait: HEALTH_SECONDS at most for the first."""
        with contextlib.suppress(queue.Empty):
            command = self._commands.get(wait, HEALTH_SECONDS if wait else None)
            while True:
                if command is not None:
                    yield command
                command = self._commands.get_nowait()

    def _deliver(self, requests: list[Any]) -> None:
        news: News = []
        for request in requests:
            if isinstance(request, EmbedRequest):
                if request.finished and request in self._embedding:
                    self._post(_resolve, self._embedding.pop(request), request.vector())
                continue
            channel = self._served.get(request)
            if channel is not None:
                news.append((channel, request.output()))
                if request.finished:
                    del self._served[request]
        if news:
            self._post(self._push, news)

    def _end(self, engine: Engine, error: RankFailed) -> None:
        """Everyone who waits is told first; ending the ranks takes time."""
        self._engine = None
        self._totals.keep(engine.stats)
        self._post(self._fail, list(self._served.values()), error)
        self._served = {}
        for future in self._embedding.values():
            self._post(_reject, future, RankFailed(str(error)))
        self._embedding = {}
        for command in self._take(wait=False):
            command.refuse(error)
        engine.close()

    def _reopen(self, attempts: int) -> tuple[Engine | None, int]:
        """(The new engine, or None when it is to stop or has failed too often in a row; attempts so far)."""
        while not self._abandon.is_set() and attempts < self._restart_attempts:
            self._abandon.wait(min(self._backoff * 2**attempts, 30.0))
            attempts += 1
            self._refuse_all()
            if self._abandon.is_set():
                break
            try:
                engine = self._begin()
            except Exception as error:
                self.failure = _reason(error)
                logger.error("the ranks could not be started again: %s", self.failure)
                self._refuse_all()
                continue
            self._restarts += 1
            logger.warning("the ranks were started again")
            return engine, attempts
        self._refuse_all()
        return None, attempts

    def _refuse_all(self) -> None:
        for command in self._take(wait=False):
            command.refuse(RankFailed(self.failure or "the engine was stopped"))

    # --- in the event loop ---

    def _post(self, callback: Callable[..., object], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _push(self, news: News) -> None:
        for channel, output in news:
            channel.push(output)
            if output.finished:
                self._channels.discard(channel)

    def _fail(self, channels: list[RequestChannel], error: Exception) -> None:
        for channel in channels:
            # Each its own: a traceback grows where an exception is raised again.
            channel.fail(type(error)(str(error)))
            self._channels.discard(channel)


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, RankFailed) else f"{type(error).__name__}: {error}"


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _reject(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
