"""CPU ranks as processes that reduce through shared memory.

Every rank owns two slots, used in turn, and a counter. A collective is: copy my part into my slot, count up, wait
until all counters have come that far, read the others' slots. A rank can be at most one collective ahead of the
slowest, and then writes into the other slot, so nobody needs to say "I have read". Sums are taken in rank order in
float32, each rank for itself, so all hold the same bits. Above a size, ranks sum one share each and read the others'
sums: less to read.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Sequence

import torch

from multitensor.errors import RankFailed
from multitensor.parallel.futex import fence, full_fence, spin_seconds, wait_reached, wake
from multitensor.parallel.group import Group, check_gather, wire_dtype
from multitensor.parallel.group_region import abort_group, read_layout
from multitensor.parallel.shared_region import SharedRegion

_TWO_PHASE_BYTES = 128 << 10  # from here on, and with three or more ranks, shares are summed instead of everything
_CACHED_SHAPES = 256
_MASK, _HALF = 0xFFFFFFFF, 0x80000000

# One turn's tensors over the slots, rank by rank, in the shape of the tensor to reduce.
_Views = tuple[list[torch.Tensor], list[torch.Tensor]]


class SharedMemoryGroup(Group):
    """rank and size as in the region. alive: called while waiting; raises when waiting has become pointless (the
    default checks that the process's parent is still the one it started with)."""

    def __init__(self, region: SharedRegion, rank: int, alive: Callable[[], None] | None = None) -> None:
        layout = read_layout(region)
        if not 0 <= rank < layout.size:
            raise ValueError(f"rank {rank} of a group of {layout.size}")
        self.rank = rank
        self.size = layout.size
        self._region = region
        self._layout = layout
        self._alive = alive or self._parent_check(os.getppid())
        self._abort_word = region.view(0, 4, "I")
        self._counters = region.view(0, layout.first_slot, "I")
        self._index = [layout.counter(r) // 4 for r in range(layout.size)]
        self._all_here = region.view(layout.all_here, 4, "I")
        self._all_here_address = region.address + layout.all_here
        self._phase = self._counters[self._index[rank]]
        self._turn = 0
        self._spin = spin_seconds(layout.size, len(os.sched_getaffinity(0)))
        self._views: dict[tuple[torch.Size, torch.dtype], _Views] = {}
        self.seconds: float = 0.0

    @staticmethod
    def _parent_check(parent: int) -> Callable[[], None]:
        def alive() -> None:
            if os.getppid() != parent:
                raise RankFailed("the engine's process has ended")

        return alive

    # -- waiting

    def _check(self) -> None:
        """Runs before every sleep: a last look at the counters, so that no order of events can leave all asleep."""
        if self._abort_word[0]:
            raise RankFailed("another rank failed")
        self._alive()
        if self._all_reached(self._phase):
            self._all_here[0] = self._phase

    def _publish_and_wait(self) -> None:
        """Says that this rank has written what it had to, and waits until all others have.

        The last to arrive moves the common "all here" counter on and wakes the sleepers, so a rank sleeps once a
        phase, however many ranks share a core. Two ranks that arrive at the same time may both think they are last:
        then both write the same number, before either can begin the next phase.
        """
        phase = self._phase = (self._phase + 1) & _MASK
        fence()
        self._counters[self._index[self.rank]] = phase
        full_fence()  # between writing our counter and reading the others': or two last ranks could miss each other
        if self._abort_word[0]:
            self._check()
        if self._all_reached(phase):
            self._all_here[0] = phase
            wake(self._all_here_address)
            return
        wait_reached(self._all_here, 0, self._all_here_address, phase, self._spin, self._check)

    def _all_reached(self, phase: int) -> bool:
        counters = self._counters
        for index in self._index:
            if (counters[index] - phase) & _HALF:
                return False
        fence()
        return True

    # -- slots

    def _slot(self, rank: int, turn: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = 1
        for length in shape:
            count *= length
        offset = self._layout.slot(rank, turn)
        return torch.frombuffer(self._region.map, dtype=dtype, count=count, offset=offset).view(tuple(shape))

    def _views_of(self, shape: torch.Size, dtype: torch.dtype) -> _Views:
        views = self._views.get((shape, dtype))
        if views is None:
            if len(self._views) >= _CACHED_SHAPES:
                self._views.clear()
            by_turn = [[self._slot(r, turn, shape, dtype) for r in range(self.size)] for turn in (0, 1)]
            views = self._views[(shape, dtype)] = (by_turn[0], by_turn[1])
        return views

    def _next_turn(self) -> int:
        self._turn ^= 1
        return self._turn

    # -- collectives

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum in float32 (float64 and integers in their own type), rounded to x's type. Overwrites x when it can."""
        if self.size == 1 or x.numel() == 0:
            return x
        started = time.perf_counter()
        x = self._sum(x)
        self.seconds += time.perf_counter() - started
        return x

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        wide = wire_dtype(x.dtype)
        nbytes = x.numel() * wide.itemsize
        if nbytes <= self._layout.slot_bytes and (self.size == 2 or nbytes < _TWO_PHASE_BYTES):
            self._reduce_piece(x, wide)
            return x
        flat = x.contiguous().view(-1)
        step = self._layout.slot_bytes // wide.itemsize
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step]
            if self.size == 2 or piece.numel() * wide.itemsize < _TWO_PHASE_BYTES:
                self._reduce_piece(piece, wide)
            else:
                self._reduce_shares(piece, wide)
        return flat.view(x.shape)

    def _reduce_piece(self, x: torch.Tensor, wide: torch.dtype) -> None:
        """x, of at most one slot, becomes the sum; every rank reads everything."""
        views = self._views_of(x.shape, wide)[self._next_turn()]
        views[self.rank].copy_(x)
        self._publish_and_wait()
        if x.dtype == wide and x.device.type == "cpu":
            torch.add(views[0], views[1], out=x)
            for view in views[2:]:
                x.add_(view)
        else:
            total = views[0] + views[1]
            for view in views[2:]:
                total += view
            x.copy_(total)

    def _reduce_shares(self, x: torch.Tensor, wide: torch.dtype) -> None:
        """The same for a long 1-D x: rank r sums the r-th share into its own slot, whose share nobody else reads
        before, and all read the sums."""
        views = self._views_of(x.shape, wide)[self._next_turn()]
        views[self.rank].copy_(x)
        self._publish_and_wait()
        length = x.numel()
        bounds = [length * r // self.size for r in range(self.size + 1)]
        start, stop = bounds[self.rank], bounds[self.rank + 1]
        total = views[0][start:stop] + views[1][start:stop]
        for view in views[2:]:
            total += view[start:stop]
        views[self.rank][start:stop] = total
        self._publish_and_wait()
        for r, view in enumerate(views):
            x[bounds[r] : bounds[r + 1]].copy_(view[bounds[r] : bounds[r + 1]])

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        check_gather(x, sizes, self.rank, self.size)
        if self.size == 1:
            return x
        started = time.perf_counter()
        out = self._gather(x, sizes)
        self.seconds += time.perf_counter() - started
        return out

    def _gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        tokens, widest = x.shape[0], max(sizes)
        ends = [sum(sizes[: r + 1]) for r in range(self.size)]
        out = torch.empty((tokens, ends[-1]), dtype=x.dtype, device=x.device)
        if tokens == 0 or widest == 0:
            return out
        # Pieces that fit a slot, the same on all ranks: as many columns of the widest part as go, then rows.
        columns = min(widest, self._layout.slot_bytes // x.dtype.itemsize)
        rows = min(tokens, self._layout.slot_bytes // (columns * x.dtype.itemsize))
        for top in range(0, tokens, rows):
            height = min(rows, tokens - top)
            for left in range(0, widest, columns):
                turn = self._next_turn()
                mine = x[top : top + height, left : left + columns]
                if mine.shape[1]:
                    self._slot(self.rank, turn, mine.shape, x.dtype).copy_(mine)
                self._publish_and_wait()
                for r, size in enumerate(sizes):
                    width = min(columns, size - left)
                    if width > 0:
                        begin = ends[r] - size + left
                        part = self._slot(r, turn, (height, width), x.dtype)
                        out[top : top + height, begin : begin + width].copy_(part)
        return out

    def gather_objects(self, value: object) -> list[object]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).view(1, -1)
        lengths = self.all_gather_last(torch.tensor([[data.shape[1]]], dtype=torch.int64), [1] * self.size)
        sizes = [int(n) for n in lengths[0]]
        everything = self.all_gather_last(data, sizes)[0].numpy().tobytes()
        ends = [sum(sizes[: r + 1]) for r in range(self.size)]
        # Bytes of our own rank processes, which share this memory anyway: unpickling gives nobody new rights.
        return [pickle.loads(everything[end - size : end]) for end, size in zip(ends, sizes, strict=True)]

    def barrier(self) -> None:
        self._next_turn()
        self._publish_and_wait()

    def abort(self, reason: str) -> None:
        """The reason itself travels to the engine by the rank's control socket."""
        abort_group(self._region)

    def close(self) -> None:
        self._views.clear()
        self._region.close()
