"""The engine for many tasks of one event loop. It runs on a thread of its own (engine_thread.py), which takes commands,
as a new request, a cancellation or a call, between steps, and hands the news of a step to the event loop in one
callback. Nothing of the engine is touched by the event loop but numbers for statistics.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

from multitensor.config import EngineConfig
from multitensor.engine.engine import Engine
from multitensor.engine.engine_thread import EngineThread
from multitensor.engine.request import RequestOutput, SamplingParams
from multitensor.engine.request_state import EmbedRequest, ReadRequest, Request
from multitensor.engine.request_stream import RequestChannel, RequestStream
from multitensor.engine.statistics import EngineSnapshot
from multitensor.errors import Overloaded, RankFailed, ShuttingDown
from multitensor.sharding.plan import Plan

STOP_SECONDS = 30.0

News = list[tuple[RequestChannel, RequestOutput]]


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
        self._thread = EngineThread(
            open_engine, self._deliver, self._lost, restart_attempts=restart_attempts, backoff=backoff
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channels: set[RequestChannel] = set()  # the event loop's; those that have not ended
        self._served: dict[Request, RequestChannel] = {}  # the thread's
        self._embedding: dict[EmbedRequest, asyncio.Future[list[float]]] = {}  # the thread's
        self._embeds = asyncio.Semaphore(max_waiting)
        self._calls: set[asyncio.Future[Any]] = set()
        self._draining = False

    # --- its life ---

    async def start(self) -> None:
        """Returns when the model is ready; raises what opening it raised."""
        loop = self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = loop.create_future()

        def tell(error: BaseException | None) -> None:
            if error is None:
                self._post(_resolve, opened, None)
            else:
                self._draining = True
                self._post(_reject, opened, error)

        self._thread.start(tell)
        await opened

    def end_requests(self) -> None:
        """Takes no more requests, and ends those under way with ShuttingDown; the ranks live on. In the event loop."""
        self._draining = True
        error = ShuttingDown("the server is shutting down, before this answer was complete")
        channels = list(self._channels)
        for channel in channels:
            self._cancel(channel)
        self._fail(channels, error)
        for future in self._calls:
            _reject(future, ShuttingDown(str(error)))

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Takes no more requests, gives those under way `drain_seconds`, then ends them (RankFailed) and the ranks."""
        self._draining = True
        deadline = time.monotonic() + drain_seconds
        while (self._channels or self._calls) and time.monotonic() < deadline and self._thread.alive:
            await asyncio.sleep(0.02)
        self._thread.stop()
        # Loading cannot be interrupted; ranks that are still being started then end with the process.
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    @property
    def ready(self) -> bool:
        """Whether a request would be taken up (unless too many wait)."""
        return self._thread.engine is not None and not self._draining

    @property
    def given_up(self) -> bool:
        """The ranks could not be started again; only a new process can help. `failure` says why."""
        return self._thread.given_up

    @property
    def failure(self) -> str | None:
        """Why there are no ranks, or why opening them failed last; None when all is well."""
        return self._thread.failure

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
        if self._thread.latest is None:
            raise RuntimeError("the engine has not been started")
        return self._thread.latest

    # --- requests ---

    def generate(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        key: str = "",
        grammar: Any = None,
        prompt: str | None = None,
        group: object = None,
    ) -> RequestStream:
        """Queues a request. key: whose it is; keys take turns. grammar: engine.grammar.GrammarSpec. group: the same
        object for all prompts that one caller asks at once: they count as one that waits, and if the first is admitted,
        so are the others.
        Raises InputError, Overloaded, ShuttingDown, or RankFailed while the ranks are being started again, all at once;
        the stream raises RankFailed when a rank dies meanwhile, ShuttingDown after `end_requests`."""
        self._admit(key, group)
        ids = self._known.check_prompt(prompt_ids)
        self._known.check_params(params)
        channel = RequestChannel(key, object() if group is None else group)
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
        self._thread.put(add, lambda error: self._post(self._fail, [channel], error))
        return RequestStream(channel, self._cancel)

    async def embed(self, ids: SequenceOf[int], *, key: str = "") -> list[float]:
        """The mean of the text's last hidden states, of length 1; [hidden]. At most max_waiting are queued at once, the
        others wait here. Raises InputError, ShuttingDown, RankFailed."""
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
        self._thread.memory = tuple(measured)
        return list(measured)

    def _require_ready(self) -> None:
        if self._draining:
            raise ShuttingDown("the server is shutting down; ask again later")
        if self._thread.engine is None:
            raise RankFailed(self.failure or "the model is not ready")

    def _admit(self, key: str, group: object) -> None:
        self._require_ready()
        if group is not None and any(channel.group is group for channel in self._channels):
            return
        keys = {channel.group: channel.key for channel in self._channels if channel.waiting}
        if len(keys) >= self.max_waiting:
            raise Overloaded(f"{len(keys)} requests wait already; ask again later")
        if self.max_waiting_per_key is not None:
            own = sum(owner == key for owner in keys.values())
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

        self._thread.put(cancel, lambda _: self._post(self._channels.discard, channel))

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
            self._thread.put(run, lambda error: self._post(_reject, future, error))
            return await future
        except (asyncio.CancelledError, ShuttingDown):
            self._thread.put(cancel, lambda error: None)
            raise
        finally:
            self._calls.discard(future)

    # --- numbers ---

    def stats(self) -> EngineSnapshot:
        """Counters as they are at this moment; does not wait for the engine."""
        thread, engine = self._thread, self._known
        load, works = engine.load(), thread.engine is not None
        current = engine.stats if works else None
        seconds, totals = thread.totals.seconds(current), thread.totals.counts(current)
        reductions = [reduction for _, reduction in seconds if reduction is not None]
        return EngineSnapshot(
            ready=self.ready,
            failure=self.failure,
            running=load.running if works else 0,
            waiting=sum(channel.waiting for channel in self._channels),
            kv_used=load.kv_used if works else 0,
            kv_cached=load.kv_cached if works else 0,
            kv_total=load.kv_total,
            prefix_hits=int(totals["prefix_hits"]),
            prefix_queries=int(totals["prefix_queries"]),
            prompt_tokens=int(totals["prefill_tokens"]),
            generated_tokens=int(totals["generated_tokens"]),
            steps=int(totals["steps"]),
            preemptions=int(totals["preemptions"]),
            prefill_seconds=totals["prefill_seconds"],
            decode_seconds=totals["decode_seconds"],
            tokens_per_second=thread.rate.read(),
            restarts=thread.restarts,
            memory=thread.memory,
            compute_seconds=tuple(compute for compute, _ in seconds) or None,
            reduction_seconds=tuple(reductions) if seconds and len(reductions) == len(seconds) else None,
        )

    # --- in the engine's thread ---

    def _deliver(self, requests: list[Request | ReadRequest]) -> None:
        news: News = []
        for request in requests:
            if isinstance(request, EmbedRequest):
                if request.finished and request in self._embedding:
                    self._post(_resolve, self._embedding.pop(request), request.vector())
                continue
            if isinstance(request, Request) and (channel := self._served.get(request)) is not None:
                news.append((channel, request.output()))
                if request.finished:
                    del self._served[request]
        if news:
            self._post(self._push, news)

    def _lost(self, error: RankFailed) -> None:
        self._post(self._fail, list(self._served.values()), error)
        self._served = {}
        for future in self._embedding.values():
            self._post(_reject, future, RankFailed(str(error)))
        self._embedding = {}

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


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _reject(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
