"""An engine on a thread of its own, opened again when its ranks die; everybody else speaks to it through commands."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from multitensor.engine.engine import Engine
from multitensor.engine.request_state import ReadRequest, Request
from multitensor.engine.statistics import TokenRate, Totals
from multitensor.errors import RankFailed

logger = logging.getLogger(__name__)

HEALTH_SECONDS = 0.2  # how often an idle engine looks whether its ranks are alive
STABLE_SECONDS = 60.0  # ranks that lived so long do not count as failing again and again
LONGEST_WAIT = 30.0  # seconds between two attempts


@dataclass(frozen=True)
class Command:
    """For the engine's thread: done between steps, or refused when there is no engine."""

    run: Callable[[Engine], None]
    refuse: Callable[[Exception], None]


class EngineThread:
    """open_engine: starts the ranks and returns the engine over them; called in the thread, and again after a rank's
    death. restart_attempts: how often in a row opening may fail before it is given up. backoff: seconds before the
    first attempt, doubled each time. deliver: of every step, in the thread, requests that have news. lost: in the
    thread, the engine's end, before its ranks are ended, which takes time.

    engine: None while there is none; latest: that one, or the one before it. failure: why there is none, or was.
    memory: what the ranks held when it was last measured. Any thread may read these.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        deliver: Callable[[list[Request | ReadRequest]], None],
        lost: Callable[[RankFailed], None],
        *,
        restart_attempts: int,
        backoff: float,
    ) -> None:
        self.engine: Engine | None = None
        self.latest: Engine | None = None
        self.failure: str | None = None
        self.restarts = 0
        self.memory: tuple[dict[str, int], ...] = ()
        self.totals = Totals()
        self.rate = TokenRate()
        self._open_engine, self._deliver, self._lost = open_engine, deliver, lost
        self._restart_attempts, self._backoff = restart_attempts, backoff
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()  # None only wakes the thread
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, opened: Callable[[BaseException | None], None]) -> None:
        """opened: called in the thread when the engine is ready, or with why it is not."""
        if self._thread is not None:
            raise RuntimeError("this engine has been started before")
        self._thread = threading.Thread(target=self._run, args=(opened,), name="engine", daemon=True)
        self._thread.start()

    def put(self, run: Callable[[Engine], None], refuse: Callable[[Exception], None]) -> None:
        """Queues a command. Any thread, a finalizer too."""
        self._commands.put(Command(run, refuse))

    def stop(self) -> None:
        """Asks for the end, before the next step."""
        self._stopping.set()
        self._commands.put(None)

    def join(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def given_up(self) -> bool:
        """It ended by itself."""
        return self._thread is not None and not self._thread.is_alive() and not self._stopping.is_set()

    # --- in the thread ---

    def _run(self, opened: Callable[[BaseException | None], None]) -> None:
        try:
            engine = self._begin()
        except BaseException as error:
            self.failure = _reason(error)
            opened(error)
            return
        opened(None)
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
                if not self._stopping.is_set():
                    logger.error("the ranks are given up after %d attempts: %s", attempts, self.failure)
                return
            engine = again

    def _begin(self) -> Engine:
        engine = self._open_engine()
        try:
            self.memory = tuple(engine.call("memory"))
        except BaseException:
            engine.close()
            raise
        self.latest = self.engine = engine
        self.failure = None
        return engine

    def _serve(self, engine: Engine) -> None:
        """Until it is told to stop; raises RankFailed."""
        while not self._stopping.is_set():
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
                self.rate.count(engine.stats.generated_tokens - before)
            else:
                engine.check()

    def _take(self, wait: bool) -> Iterator[Command]:
        """The commands at hand; wait: HEALTH_SECONDS at most for the first."""
        with contextlib.suppress(queue.Empty):
            command = self._commands.get(wait, HEALTH_SECONDS if wait else None)
            while True:
                if command is not None:
                    yield command
                command = self._commands.get_nowait()

    def _end(self, engine: Engine, error: RankFailed) -> None:
        """Everyone who waits is told first."""
        self.engine = None
        self.totals.keep(engine.stats)
        self._lost(error)
        for command in self._take(wait=False):
            command.refuse(error)
        engine.close()

    def _reopen(self, attempts: int) -> tuple[Engine | None, int]:
        """(The new engine, or None when it is to stop or has failed too often in a row; attempts so far)."""
        while not self._stopping.is_set() and attempts < self._restart_attempts:
            self._stopping.wait(min(self._backoff * 2**attempts, LONGEST_WAIT))
            attempts += 1
            self._refuse_all()
            if self._stopping.is_set():
                break
            try:
                engine = self._begin()
            except Exception as error:
                self.failure = _reason(error)
                logger.error("the ranks could not be started again: %s", self.failure)
                self._refuse_all()
                continue
            self.restarts += 1
            logger.warning("the ranks were started again")
            return engine, attempts
        self._refuse_all()
        return None, attempts

    def _refuse_all(self) -> None:
        for command in self._take(wait=False):
            command.refuse(RankFailed(self.failure or "the engine was stopped"))


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, RankFailed) else f"{type(error).__name__}: {error}"
