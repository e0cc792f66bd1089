"""Where a rank's time goes in steps: computing, and in reductions. Imported by ranks only: it imports torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from multitensor.parallel.group import Group


class RankClock:
    """compute, reduction: seconds so far.

    On a CPU `work` surrounds what is computed, and the group tells how much of it was spent in its calls, waiting for
    slower ranks included. A GPU works on by itself, so a step lies between two of its events, and reductions, which are
    inside recorded graphs, are part of `compute`: telling them apart would cost more launches.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._on_host = device.type == "cpu"
        self.compute = 0.0
        self.reduction: float | None = 0.0 if self._on_host and group.seconds is not None else None

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around what a step computes; for a GPU it does nothing."""
        if not self._on_host:
            yield
            return
        reduced, started = self._group.seconds, time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        if self.reduction is not None and self._group.seconds is not None and reduced is not None:
            reduced = self._group.seconds - reduced
            self.reduction += reduced
            seconds -= reduced
        self.compute += seconds

    def mark(self) -> torch.cuda.Event | None:
        """A GPU's place in its queue of work; None on a CPU."""
        if self._on_host:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add_between(self, first: torch.cuda.Event | None, last: torch.cuda.Event | None) -> None:
        """What a GPU did between two marks that it has passed."""
        if first is not None and last is not None:
            self.compute += first.elapsed_time(last) / 1e3
