"""Notices a lost rank while a command waits for its user and no call is under way that would raise."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from multitensor.errors import RankFailed

CHECK_SECONDS = 0.2


@contextmanager
def raise_when_lost(check: Callable[[], None]) -> Iterator[None]:
    """Raises RankFailed in the main thread, which must be the caller, soon after check() does, also out of input().

    check: raises RankFailed when a rank is lost; called from another thread. The main thread is woken by SIGUSR1,
    since only a signal ends the read that input() waits in, and SIGINT may be ignored (as under nohup).
    """
    lost: list[RankFailed] = []
    over = threading.Event()
    main = threading.get_ident()

    def watch() -> None:
        while not over.wait(CHECK_SECONDS):
            try:
                check()
            except RankFailed as failure:
                lost.append(failure)
                signal.pthread_kill(main, signal.SIGUSR1)
                return

    def wake(number: int, frame: FrameType | None) -> None:
        if lost:
            raise RankFailed(str(lost[0]))

    signal.signal(signal.SIGUSR1, wake)
    watcher = threading.Thread(target=watch, name="multitensor-rank-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        # Not what it was before: a wake-up on its way would then end the process without a word.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
