"""The step from the engine to the ranks and the results back: rings of bytes in shared memory (never imports torch).

A ring has one writer and one or more readers, who all read everything. Positions are 64-bit byte counts that only grow;
the low half of a position doubles as the futex on which the other side sleeps. A message is its length (8 bytes) and a
pickle; it may be larger than the ring, and then flows through it. A full ring makes the writer wait for the slowest
reader: that is the back-pressure.

    offset 0            abort word (uint32), number of ranks (uint32), bytes in the ring of steps and in one of results
    line 1 + r          rank r's progress: bytes loaded, bytes to load (uint64 each); then its nanoseconds computing and
                        in reductions (int64 each; -1: not measured)
    then                the ring of steps (engine -> all ranks), then one ring of results a rank (rank -> engine)
"""

from __future__ import annotations

import os
import pickle
from typing import Any

from multitensor.errors import RankFailed
from multitensor.parallel.futex import Check, fence, spin_seconds, wait_reached, wake
from multitensor.parallel.shared_region import LINE, SharedRegion

STEP_RING_BYTES = 4 << 20
RESULT_RING_BYTES = 4 << 20
_LENGTH = 8
_MASK = 0xFFFFFFFF


class _Ring:
    """The memory of one ring: head (line 0), one tail a reader (lines 1..), then `capacity` bytes."""

    def __init__(self, region: SharedRegion, offset: int, readers: int, capacity: int) -> None:
        self.capacity = capacity
        self.readers = readers
        self.positions = region.view(offset, LINE * (1 + readers), "Q")
        self.words = region.view(offset, LINE * (1 + readers), "I")  # the same memory, for waiting (low halves)
        self.address = region.address + offset
        self.data = region.view(offset + LINE * (1 + readers), capacity, "B")

    @staticmethod
    def nbytes(readers: int, capacity: int) -> int:
        return LINE * (1 + readers) + capacity

    def position(self, line: int) -> int:
        """line 0: head; 1 + r: the tail of reader r."""
        return self.positions[line * (LINE // 8)]

    def publish(self, line: int, position: int) -> None:
        fence()
        self.positions[line * (LINE // 8)] = position
        wake(self.address + line * LINE)

    def wait_for(self, line: int, target: int, spin: float, check: Check) -> None:
        """Until that position has reached `target`."""
        wait_reached(self.words, line * (LINE // 4), self.address + line * LINE, target & _MASK, spin, check)


class RingWriter:
    """The writing end. All state is in the shared memory, and one store makes a message visible, so an exception
    (a KeyboardInterrupt, say) before it leaves the ring as it was. Only messages larger than the ring go in pieces."""

    def __init__(self, region: SharedRegion, offset: int, readers: int, capacity: int, spin: float) -> None:
        self._ring = _Ring(region, offset, readers, capacity)
        self._spin = spin

    def send(self, message: bytes, check: Check) -> None:
        """Blocks while the ring is too full; `check` runs while it does."""
        frame = memoryview(len(message).to_bytes(_LENGTH, "little") + message)
        while frame:
            piece = frame[: self._ring.capacity]
            self._put(piece, check)
            frame = frame[len(piece) :]

    def slowest(self) -> tuple[int, ...]:
        """Readers that have not read all that another has."""
        read = [self._ring.position(1 + reader) for reader in range(self._ring.readers)]
        return tuple(reader for reader, position in enumerate(read) if position < max(read))

    def _put(self, piece: memoryview, check: Check) -> None:
        ring = self._ring
        head = ring.position(0)
        for line in range(1, 1 + ring.readers):
            needed = head + len(piece) - ring.capacity
            if needed > ring.position(line):
                ring.wait_for(line, needed, self._spin, check)
        start = head % ring.capacity
        first = min(len(piece), ring.capacity - start)
        ring.data[start : start + first] = piece[:first]
        ring.data[: len(piece) - first] = piece[first:]
        ring.publish(0, head + len(piece))


class RingReader:
    """One reader's end. As with the writer, one store takes a message out."""

    def __init__(
        self, region: SharedRegion, offset: int, readers: int, capacity: int, reader: int, spin: float
    ) -> None:
        self._ring = _Ring(region, offset, readers, capacity)
        self._line = 1 + reader
        self._spin = spin

    @property
    def pending(self) -> bool:
        """Whether a message has begun to arrive."""
        return self._ring.position(0) != self._ring.position(self._line)

    def receive(self, check: Check) -> bytearray:
        """The next message; blocks until it is complete; `check` runs while it does."""
        ring = self._ring
        tail = ring.position(self._line)
        ring.wait_for(0, tail + _LENGTH, self._spin, check)
        length = int.from_bytes(self._copy(tail, _LENGTH), "little")
        if _LENGTH + length <= ring.capacity:
            ring.wait_for(0, tail + _LENGTH + length, self._spin, check)
            message = self._copy(tail + _LENGTH, length)
            ring.publish(self._line, tail + _LENGTH + length)
            return message
        return self._receive_in_pieces(tail, _LENGTH + length, check)

    def _receive_in_pieces(self, tail: int, left: int, check: Check) -> bytearray:
        """A frame of `left` bytes, in the pieces in which the writer puts it."""
        ring = self._ring
        frame = bytearray()
        while left:
            count = min(left, ring.capacity)
            ring.wait_for(0, tail + count, self._spin, check)
            frame += self._copy(tail, count)
            tail += count
            left -= count
            ring.publish(self._line, tail)
        return frame[_LENGTH:]

    def _copy(self, position: int, count: int) -> bytearray:
        ring = self._ring
        start = position % ring.capacity
        first = min(count, ring.capacity - start)
        out = bytearray(ring.data[start : start + first])
        out += ring.data[: count - first]
        return out


class _Layout:
    def __init__(self, size: int, step_bytes: int, result_bytes: int) -> None:
        self.size = size
        self.step_bytes = step_bytes
        self.result_bytes = result_bytes
        self.steps = LINE * (1 + size)
        self.first_result = self.steps + _align(_Ring.nbytes(size, step_bytes))
        self.result_stride = _align(_Ring.nbytes(1, result_bytes))
        self.total = self.first_result + size * self.result_stride

    def result(self, rank: int) -> int:
        return self.first_result + rank * self.result_stride


def _align(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE


class EngineChannel:
    """The engine's side. Creates the memory; `region.fd` goes to the ranks."""

    def __init__(
        self, size: int, step_ring_bytes: int = STEP_RING_BYTES, result_ring_bytes: int = RESULT_RING_BYTES
    ) -> None:
        layout = _Layout(size, step_ring_bytes, result_ring_bytes)
        self.size = size
        self.region = SharedRegion.create("steps", layout.total)
        header = self.region.view(0, 16, "I")
        header[1], header[2], header[3] = size, step_ring_bytes, result_ring_bytes
        self._abort = header
        self._progress = self.region.view(0, LINE * (1 + size), "Q")
        self._nanoseconds = self.region.view(0, LINE * (1 + size), "q")
        # The engine is one process more than the ranks.
        spin = spin_seconds(size + 1, len(os.sched_getaffinity(0)))
        self._steps = RingWriter(self.region, layout.steps, size, step_ring_bytes, spin)
        self._results = [RingReader(self.region, layout.result(r), 1, result_ring_bytes, 0, spin) for r in range(size)]

    def send(self, message: object, check: Check) -> None:
        """To all ranks. Blocks only while the ring is full; what `check` raises meanwhile goes to the caller, and the
        channel is then of no further use."""
        self._steps.send(pickle.dumps(message, protocol=5), check)

    def receive(self, rank: int, check: Check) -> Any:
        """That rank's next result; blocks, and calls `check` at least every 50 ms."""
        return pickle.loads(self._results[rank].receive(check))

    def pending(self, rank: int) -> bool:
        """Whether `receive` would have something to read."""
        return self._results[rank].pending

    def behind(self) -> tuple[int, ...]:
        """Ranks that have not read all that another has."""
        return self._steps.slowest()

    def progress(self) -> tuple[int, int]:
        """Bytes loaded and bytes to load, summed over the ranks that have reported."""
        lines = range(1, 1 + self.size)
        return (
            sum(self._progress[line * (LINE // 8)] for line in lines),
            sum(self._progress[line * (LINE // 8) + 1] for line in lines),
        )

    def seconds(self) -> tuple[tuple[float, float | None], ...]:
        """By rank: what it reported last of its time computing and in reductions."""
        found = []
        for line in range(1, 1 + self.size):
            compute, reduction = (self._nanoseconds[line * (LINE // 8) + place] for place in (2, 3))
            found.append((compute / 1e9, reduction / 1e9 if reduction >= 0 else None))
        return tuple(found)

    def abort(self) -> None:
        """Makes ranks that wait in this channel raise RankFailed."""
        self._abort[0] = 1

    def close(self) -> None:
        self.region.close()


class RankChannel:
    """A rank's side, over the engine's memory."""

    def __init__(self, region: SharedRegion, rank: int) -> None:
        header = region.view(0, 16, "I")
        layout = _Layout(header[1], header[2], header[3])
        if not 0 <= rank < layout.size:
            raise ValueError(f"rank {rank} of a channel for {layout.size}")
        self._region = region
        self._header = header
        self._progress = region.view(LINE * (1 + rank), 16, "Q")
        self._nanoseconds = region.view(LINE * (1 + rank) + 16, 16, "q")
        spin = spin_seconds(layout.size + 1, len(os.sched_getaffinity(0)))
        self._steps = RingReader(region, layout.steps, layout.size, layout.step_bytes, rank, spin)
        self._results = RingWriter(region, layout.result(rank), 1, layout.result_bytes, spin)

    def _check(self) -> None:
        if self._header[0]:
            raise RankFailed("the engine has given up")

    def receive(self) -> Any:
        """The engine's next message."""
        return pickle.loads(self._steps.receive(self._check))

    def pending(self) -> bool:
        """Whether a message is there already."""
        return self._steps.pending

    def send(self, result: object) -> None:
        """To the engine."""
        self._results.send(pickle.dumps(result, protocol=5), self._check)

    def report_progress(self, done: int, total: int) -> None:
        """Bytes loaded by this rank, of how many."""
        self._progress[1] = total
        self._progress[0] = done

    def report_seconds(self, compute: float, reduction: float | None) -> None:
        """This rank's time so far; reduction: None if it is not measured."""
        self._nanoseconds[0] = round(compute * 1e9)
        self._nanoseconds[1] = -1 if reduction is None else round(reduction * 1e9)

    def close(self) -> None:
        self._region.close()
