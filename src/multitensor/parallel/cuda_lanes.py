"""Lanes of large sums (large_sums.py) as streams of a GPU. Has run for ranks that share one GPU, not yet for two."""

from __future__ import annotations

from collections.abc import Callable

import torch

from multitensor.kernels.cuda.flags import Flags
from multitensor.parallel.host_memory import HostMemory
from multitensor.parallel.large_sums import FLAG_BYTES, Lane
from multitensor.parallel.shared_region import LINE


class CudaLanes:
    """Three streams; the caller's lane is whatever stream is current. They go before the products beside them: their
    kernels are few and small, and others wait for them."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory, self._device = memory, memory.device
        self.flags = Flags(memory.rank, memory.device)
        self._streams = {lane: torch.cuda.Stream(memory.device, priority=-1) for lane in ("up", "down", "sum")}
        self._addresses: list[torch.Tensor] = []

    def place_flags(self, offset: int) -> None:
        """Before any flag is used: where they lie in every mailbox, one a line."""
        self._addresses = [self._memory.table(offset + at) for at in range(0, FLAG_BYTES, LINE)]

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if lane == "caller" else self._streams[lane]

    def run(self, lane: Lane, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream(lane)):
            work()

    def mark(self, lane: Lane) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream(lane))
        return event

    def after(self, lane: Lane, mark: object) -> None:
        if not isinstance(mark, torch.cuda.Event):
            raise TypeError(f"a stream cannot wait for {mark!r}")
        self._stream(lane).wait_event(mark)

    def raise_flag(self, lane: Lane, flag: int, value: int) -> None:
        with torch.cuda.stream(self._stream(lane)):
            self.flags.raise_flag(self._addresses[flag], value)

    def await_flags(self, lane: Lane, flag: int, value: int) -> None:
        with torch.cuda.stream(self._stream(lane)):
            self.flags.await_flags(self._addresses[flag], value)
