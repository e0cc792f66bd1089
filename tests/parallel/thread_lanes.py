"""Lanes of large sums as threads, with random delays; or all as one thread, which does one thing after another."""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable
from functools import partial

import torch

from multitensor.errors import RankFailed
from multitensor.parallel.host_memory import HostMemory, section_bytes
from multitensor.parallel.large_sums import Lane
from multitensor.parallel.shared_region import LINE, SharedRegion

CPU = torch.device("cpu")


def mailboxes(size: int, nbytes: int) -> list[HostMemory]:
    """Each rank's handle, with a mapping of its own."""
    region = SharedRegion.create("test", size * section_bytes(nbytes))
    regions = [region, *(SharedRegion(os.dup(region.fd)) for _ in range(size - 1))]
    return [HostMemory(rank, size, own, own.address, CPU) for rank, own in enumerate(regions)]


class ThreadLanes:
    """delay: seconds that work takes longer, at random up to this. serial: one thread does everything. patience: of a
    wait, in seconds, after which the rank fails, as every later call then does."""

    def __init__(self, memory: HostMemory, *, delay: float = 0.0, serial: bool = False, patience: float = 30.0) -> None:
        self.memory, self.patience, self.delay = memory, patience, delay
        self.flags = 0
        self.error: Exception | None = None
        self._random = random.Random(memory.rank)
        queues: list[queue.SimpleQueue[Callable[[], object] | None]] = [queue.SimpleQueue() for _ in range(3)]
        self._queues = dict(zip(("up", "down", "sum"), queues[:1] * 3 if serial else queues, strict=True))
        self._threads = [
            threading.Thread(target=self._work, args=(own,)) for own in {id(q): q for q in queues}.values()
        ]
        for thread in self._threads:
            thread.start()
        self._all = queues

    def close(self) -> None:
        for own in self._all:
            own.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, own: queue.SimpleQueue[Callable[[], object] | None]) -> None:
        while (work := own.get()) is not None:
            if self.error is not None:
                continue
            if self.delay and self._random.random() < 0.3:
                time.sleep(self.delay * self._random.random())
            try:
                work()
            except Exception as error:
                self.error = error

    def _until(self, reached: Callable[[], bool], what: str) -> None:
        began = time.monotonic()
        while not reached():
            if self.error is not None:
                raise self.error
            if time.monotonic() > began + self.patience:  # which may change meanwhile
                raise RankFailed(f"waited in vain for {what}")
            time.sleep(0.0002)

    def run(self, lane: Lane, work: Callable[[], None]) -> None:
        self._queues[lane].put(work)

    def mark(self, lane: Lane) -> threading.Event:
        event = threading.Event()
        if lane == "caller":
            event.set()
        else:
            self._queues[lane].put(event.set)
        return event

    def after(self, lane: Lane, mark: object) -> None:
        assert isinstance(mark, threading.Event)
        if lane == "caller":
            self._until(mark.is_set, "the sum")
        else:
            self._queues[lane].put(lambda: self._until(mark.is_set, f"a mark, in {lane}"))

    def _flag(self, rank: int, flag: int) -> torch.Tensor:
        return self.memory.of(rank, self.flags + flag * LINE, 4).view(torch.int32)

    def raise_flag(self, lane: Lane, flag: int, value: int) -> None:
        self._queues[lane].put(lambda: self._flag(self.memory.rank, flag).fill_(value))

    def await_flags(self, lane: Lane, flag: int, value: int) -> None:
        others = [rank for rank in range(self.memory.size) if rank != self.memory.rank]
        for rank in others:
            self._queues[lane].put(partial(self._await, rank, flag, value))

    def _await(self, rank: int, flag: int, value: int) -> None:
        own = self._flag(rank, flag)
        self._until(lambda: int(own) >= value, f"flag {flag} of rank {rank}")
