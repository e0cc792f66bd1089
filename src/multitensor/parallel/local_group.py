"""Ranks as threads of one process: for tests and for debugging, no processes needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from multitensor.errors import RankFailed
from multitensor.parallel.group import Group, check_gather, wire_dtype


class _Meeting:
    """What the ranks of one LocalGroup share. Contributions go into two sets of places used in turn: a rank that is
    one collective ahead writes into the other set, and cannot be two ahead, so one barrier a collective is enough."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.places: tuple[list[object], list[object]] = ([None] * size, [None] * size)
        self.reason: str | None = None
        self.lock = threading.Lock()


class LocalGroup(Group):
    """One thread's handle. Sums are taken in float32 (float64 and integers in their own type), in rank order."""

    def __init__(self, meeting: _Meeting, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._meeting = meeting
        self._turn = 0

    @classmethod
    def make(cls, size: int) -> list[LocalGroup]:
        """One handle a rank, each to be used by one thread."""
        if size < 1:
            raise ValueError(f"a group of {size} ranks")
        meeting = _Meeting(size)
        return [cls(meeting, rank, size) for rank in range(size)]

    def _exchange(self, value: object) -> list[object]:
        meeting = self._meeting
        places = meeting.places[self._turn]
        self._turn ^= 1
        places[self.rank] = value
        try:
            meeting.barrier.wait()
        except threading.BrokenBarrierError:
            raise RankFailed(meeting.reason or "another rank left the group") from None
        return list(places)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        wide = wire_dtype(x.dtype)
        # A copy, because others still read it when this rank goes on to overwrite x.
        parts = self._exchange(x.to(wide, copy=True))
        total: torch.Tensor = parts[0].to(x.device, copy=True)  # type: ignore[attr-defined]
        for part in parts[1:]:
            total += part.to(x.device)  # type: ignore[attr-defined]
        return total.to(x.dtype)

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        check_gather(x, sizes, self.rank, self.size)
        parts = self._exchange(x.clone())
        return torch.cat([part.to(x.device) for part in parts], dim=1)  # type: ignore[attr-defined]

    def gather_objects(self, value: object) -> list[object]:
        return self._exchange(value)

    def barrier(self) -> None:
        self._exchange(None)

    def abort(self, reason: str) -> None:
        with self._meeting.lock:
            if self._meeting.reason is None:
                self._meeting.reason = reason
        self._meeting.barrier.abort()
