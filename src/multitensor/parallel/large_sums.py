"""Sums of many rows over ranks that share the host's memory, in chunks, for GPUs that do not reach each other's.

Three lanes of work run beside each other: UP copies chunks from the device into this rank's mailbox, DOWN copies other
ranks' chunks from theirs to the device, SUM adds them there. What lane does what and when is all this file says; what a
lane is, a stream of a GPU or a thread of a test, is the caller's (Lanes). Flags in the mailboxes, counters of chunks,
tell the other ranks how far a rank is: SENT its chunks, DONE its results, READ all that it needed of the others'.

Two ranks send each other everything. More ranks cut a chunk into a share each: a rank gets its share of all the others'
chunks, adds, and sends the result, so each moves about twice the sum, whatever their number. Either way parts are added
in rank order in float32, and all ranks hold the same bits.

Work is handed to the lanes in an order in which it could also be done one thing after another (tests do so): nobody can
then wait for what nobody will do, whichever of the lanes the device lets run at the same time.

Run for ranks that share one GPU, not yet for two: used only where results were right and faster than NCCL's when the
ranks started, see large_choice.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from multitensor.parallel.host_memory import HostMemory
from multitensor.parallel.shared_region import LINE
from multitensor.parallel.wire import GROUP, ChunkMath, TorchMath, WireName, row_bytes

Lane = Literal["caller", "up", "down", "sum"]
SENT, DONE, READ = range(3)
FLAG_BYTES = 3 * LINE


class Lanes(Protocol):
    """Where work is done. All calls return at once; "caller" is where the caller's own work is done."""

    def run(self, lane: Lane, work: Callable[[], None]) -> None:
        """Hands over work, to be done after all that the lane got before."""

    def mark(self, lane: Lane) -> object:
        """The end of what the lane has got so far."""

    def after(self, lane: Lane, mark: object) -> None:
        """What the lane gets from now on is done after the mark."""

    def raise_flag(self, lane: Lane, flag: int, value: int) -> None:
        """This rank's flag becomes `value`, after all that the lane got before."""

    def await_flags(self, lane: Lane, flag: int, value: int) -> None:
        """What the lane gets from now on is done after all other ranks' flag has reached `value`; with a limit of time,
        after which the rank fails."""


@dataclass
class _Chunk:
    """number: counted on from one sum to the next. numbers: some of the tensor's, 1-D; slot: where it passes through.
    length: of a row; there is one, or one a rank. packed: uint8 [rows, bytes], what this rank sends, once made."""

    number: int
    slot: int
    numbers: torch.Tensor
    length: int
    packed: torch.Tensor | None = None
    sent: object = None
    added: object = None


class LargeSums:
    """One rank's end. All ranks make it alike, and then the same calls in the same order.

    memory: carved from here; nobody may send before all ranks have made theirs. slots: chunks under way at most, 4 or
    more. slot_bytes: of the largest chunk. wire: of 16-bit numbers; others travel exactly. shares: see above; by
    default with three ranks and more. math: what computes; may be replaced between sums.
    """

    def __init__(
        self,
        lanes: Lanes,
        memory: HostMemory,
        *,
        slots: int,
        slot_bytes: int,
        wire: WireName = "exact",
        shares: bool | None = None,
    ) -> None:
        if slots < 4 or slot_bytes % (4 * GROUP):
            raise ValueError(f"{slots} slots of {slot_bytes} bytes: at least 4 of a multiple of {4 * GROUP} are needed")
        self._lanes, self._memory = lanes, memory
        self.flags = memory.carve(FLAG_BYTES)
        memory.of(memory.rank, self.flags, FLAG_BYTES).zero_()
        self._chunks, self._results = memory.carve(slots * slot_bytes), memory.carve(slots * slot_bytes)
        self._slots, self._slot_bytes, self._wire = slots, slot_bytes, wire
        self._shares = memory.size > 2 if shares is None else shares
        self._rows = memory.size if self._shares else 1
        parts, place = 1 if self._shares else memory.size - 1, memory.device
        self._packed = torch.empty(slots, slot_bytes, dtype=torch.uint8, device=place)
        self._parts = torch.empty(slots, parts * slot_bytes, dtype=torch.uint8, device=place)
        self._sums = torch.empty(slots, slot_bytes if self._shares else 0, dtype=torch.uint8, device=place)
        self._free: list[object] = [None] * slots  # the end of the last work with a slot's places on the device
        self._number = 0
        self.math: ChunkMath = TorchMath()

    def all_reduce(self, x: torch.Tensor, chunk_bytes: int | None = None) -> torch.Tensor:
        """x, contiguous, becomes the sum; x itself is returned. What the caller's lane gets afterwards finds it there.
        chunk_bytes: of x's numbers in a chunk, at most slot_bytes (the default); the same on all ranks."""
        if x.numel() == 0:
            return x
        lanes, numbers = self._lanes, x.view(-1)
        step = self._step(x.dtype, chunk_bytes or self._slot_bytes)
        chunks = [self._chunk(numbers[first : first + step], i) for i, first in enumerate(range(0, len(numbers), step))]
        self._number += len(chunks)
        lanes.after("up", lanes.mark("caller"))
        for turn in range(len(chunks) + 2):
            # Later stages of earlier chunks: before a slot is used again, all of its last use has been handed over.
            for stage, behind in ((self._send, 0), (self._receive, 1), (self._publish, 1), (self._collect, 2)):
                if 0 <= turn - behind < len(chunks):
                    stage(chunks[turn - behind])
        lanes.after("caller", lanes.mark("sum"))
        return x

    def _step(self, dtype: torch.dtype, chunk_bytes: int) -> int:
        """Numbers in a chunk: rows of whole groups, however they are written."""
        group = self._rows * GROUP
        if not group * dtype.itemsize <= chunk_bytes <= self._slot_bytes:
            raise ValueError(f"chunks of {chunk_bytes} bytes in slots of {self._slot_bytes}")
        return chunk_bytes // (group * dtype.itemsize) * group

    def _chunk(self, numbers: torch.Tensor, index: int) -> _Chunk:
        number = self._number + index
        length = -(-len(numbers) // (self._rows * GROUP)) * GROUP
        return _Chunk(number, number % self._slots, numbers, length)

    # -- stages, as they are handed over

    def _send(self, chunk: _Chunk) -> None:
        lanes, last_use = self._lanes, self._free[chunk.slot]
        if last_use is not None:
            lanes.after("up", last_use)
            lanes.await_flags("up", READ, chunk.number - self._slots + 1)
        lanes.run("up", lambda: self._upload(chunk))
        lanes.raise_flag("up", SENT, chunk.number + 1)
        chunk.sent = lanes.mark("up")

    def _receive(self, chunk: _Chunk) -> None:
        lanes, last_use = self._lanes, self._free[chunk.slot]
        if last_use is not None:
            lanes.after("down", last_use)
        lanes.await_flags("down", SENT, chunk.number + 1)
        lanes.run("down", lambda: self._download(chunk))
        if not self._shares:
            lanes.raise_flag("down", READ, chunk.number + 1)
        lanes.after("sum", lanes.mark("down"))
        lanes.after("sum", chunk.sent)  # the sum overwrites what was sent
        lanes.run("sum", lambda: self._add_share(chunk) if self._shares else self._add(chunk))
        chunk.added = self._free[chunk.slot] = lanes.mark("sum")

    def _publish(self, chunk: _Chunk) -> None:
        if self._shares:
            self._lanes.after("up", chunk.added)
            self._lanes.run("up", lambda: self._upload_result(chunk))
            self._lanes.raise_flag("up", DONE, chunk.number + 1)

    def _collect(self, chunk: _Chunk) -> None:
        if self._shares:
            lanes = self._lanes
            lanes.await_flags("down", DONE, chunk.number + 1)
            lanes.run("down", lambda: self._download_results(chunk))
            lanes.raise_flag("down", READ, chunk.number + 1)
            lanes.after("sum", lanes.mark("down"))
            lanes.run("sum", lambda: self._finish(chunk))
            self._free[chunk.slot] = lanes.mark("sum")

    # -- work of the lanes

    def _wire_of(self, chunk: _Chunk) -> WireName:
        return self._wire if chunk.numbers.dtype.itemsize == 2 else "exact"

    def _row_bytes(self, chunk: _Chunk) -> int:
        return row_bytes(self._wire_of(chunk), chunk.length, chunk.numbers.dtype)

    def _rows_of(self, places: torch.Tensor, chunk: _Chunk, rows: int) -> torch.Tensor:
        """A slot's bytes as [rows, row_bytes]."""
        nbytes = self._row_bytes(chunk)
        return places[chunk.slot, : rows * nbytes].view(rows, nbytes)

    def _upload(self, chunk: _Chunk) -> None:
        numbers, rows = chunk.numbers, self._rows
        if self._wire_of(chunk) == "exact" and len(numbers) == rows * chunk.length:
            chunk.packed = numbers.view(rows, chunk.length).view(torch.uint8)
        else:
            chunk.packed = self._rows_of(self._packed, chunk, rows)
            self.math.pack(self._wire_of(chunk), numbers, chunk.length, chunk.packed)
        own, nbytes = self._memory.rank, self._row_bytes(chunk)
        for first, stop in ((0, own), (own + 1, rows)) if self._shares else ((0, 1),):
            if first < stop:
                start = self._chunks + chunk.slot * self._slot_bytes + first * nbytes
                place = self._memory.of(own, start, (stop - first) * nbytes)
                place.copy_(chunk.packed[first:stop].view(-1), non_blocking=True)

    def _others(self) -> list[tuple[int, int]]:
        """(place among the received rows, rank) of all other ranks."""
        return [(r - (r > self._memory.rank), r) for r in range(self._memory.size) if r != self._memory.rank]

    def _fetch(self, chunk: _Chunk, start: int, into: torch.Tensor) -> None:
        """A row from the same place in all other ranks' mailboxes."""
        for place, rank in self._others():
            source = self._memory.of(rank, start, into.shape[1])
            into[place].copy_(source, non_blocking=True)

    def _download(self, chunk: _Chunk) -> None:
        row = self._memory.rank if self._shares else 0
        start = self._chunks + chunk.slot * self._slot_bytes + row * self._row_bytes(chunk)
        self._fetch(chunk, start, self._rows_of(self._parts, chunk, self._memory.size - 1))

    def _add(self, chunk: _Chunk) -> None:
        """Everything; this rank's own part as the others see it, so that all add the same."""
        wire, received = self._wire_of(chunk), self._rows_of(self._parts, chunk, self._memory.size - 1)
        own = None if wire == "exact" or chunk.packed is None else chunk.packed[0]
        self.math.add(wire, chunk.numbers, own, received, self._memory.rank, chunk.length, None)

    def _share(self, chunk: _Chunk, rank: int) -> torch.Tensor:
        """The numbers of a rank's share, fewer than a row at the end of a tensor, or none."""
        return chunk.numbers[rank * chunk.length : (rank + 1) * chunk.length]

    def _add_share(self, chunk: _Chunk) -> None:
        rank, received = self._memory.rank, self._rows_of(self._parts, chunk, self._memory.size - 1)
        share, result = self._share(chunk, rank), self._rows_of(self._packed, chunk, 1)[0]
        self.math.add(self._wire_of(chunk), share, None, received, rank, chunk.length, result)

    def _upload_result(self, chunk: _Chunk) -> None:
        result = self._rows_of(self._packed, chunk, 1)[0]
        start = self._results + chunk.slot * self._slot_bytes
        self._memory.of(self._memory.rank, start, len(result)).copy_(result, non_blocking=True)

    def _download_results(self, chunk: _Chunk) -> None:
        start = self._results + chunk.slot * self._slot_bytes
        self._fetch(chunk, start, self._rows_of(self._sums, chunk, self._memory.size - 1))

    def _finish(self, chunk: _Chunk) -> None:
        received = self._rows_of(self._sums, chunk, self._memory.size - 1)
        for place, rank in self._others():
            self.math.unpack(self._wire_of(chunk), received[place], chunk.length, self._share(chunk, rank))
