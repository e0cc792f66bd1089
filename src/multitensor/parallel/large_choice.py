"""Whether sums of many rows go through the host's memory, and in what chunks: tried and timed when the ranks start.

They do from that number of rows on from which, on the slowest rank, they were faster than NCCL for every larger number
that was timed, provided that trial sums came out right: to the last bit, or with an 8-bit wire as close as it promises
and with the same bits on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from multitensor.kernels.cuda.chunks import ChunkKernels
from multitensor.parallel.cuda_lanes import CudaLanes
from multitensor.parallel.host_memory import HostMemory
from multitensor.parallel.large_sums import LargeSums
from multitensor.parallel.trials import NO_ANSWER, TRIAL_MS, failure_of, first_reason
from multitensor.parallel.wire import TorchMath, WireName
from multitensor.sharding.memory import HOST_CHUNK_BYTES, HOST_SLOTS, MIB

if TYPE_CHECKING:
    from multitensor.parallel.group import Group

ROWS = (128, 512, 2048)  # that are timed; other numbers go as the next smaller one
CHUNKS = (MIB, HOST_CHUNK_BYTES)
_TRIAL_CHUNK = MIB // 8
_REPEATS = 4
ALIGNED = 16  # bytes: where four numbers of any type begin


@dataclass(frozen=True)
class LargeTiming:
    """Seconds of a sum of so many rows through NCCL, and through the host's memory by bytes of a chunk; each of the
    slowest rank."""

    rows: int
    nccl: float
    host: dict[int, float]

    @property
    def chunk(self) -> int | None:
        """Bytes of the fastest chunks; None where NCCL is faster."""
        best = min(self.host, key=lambda chunk: self.host[chunk], default=None)
        return best if best is not None and self.host[best] < self.nccl else None


def decide(timings: Sequence[LargeTiming]) -> list[tuple[int, int]]:
    """(fewest rows, bytes of a chunk) of the sums that go through the host's memory, ascending; others take NCCL."""
    chosen: list[tuple[int, int]] = []
    for timing in sorted(timings, key=lambda timing: -timing.rows):
        if timing.chunk is None:
            break
        chosen.insert(0, (timing.rows, timing.chunk))
    return chosen


class LargeChoice:
    """What a group does with sums of many rows of `hidden` numbers in `dtype`: nothing, until `choose` was called."""

    def __init__(
        self, sums: LargeSums, hidden: int, dtype: torch.dtype, wire: WireName, without_kernels: str | None = None
    ) -> None:
        """without_kernels: why torch's operations do what kernels of our own do elsewhere."""
        self._without_kernels = without_kernels
        self._sums, self._row_bytes, self._dtype, self._wire = sums, hidden * dtype.itemsize, dtype, wire
        self._chosen: list[tuple[int, int]] = []
        self.timings: list[LargeTiming] = []

    def choose(self, group: Group, device: torch.device) -> None:
        """Collective. Before the group itself sums this way."""
        self.timings = [self._time(group, device, rows) for rows in ROWS]
        self._chosen = decide(self.timings)

    def chunk_for(self, x: torch.Tensor) -> int | None:
        """Bytes of the chunks in which such a tensor is summed, the same on all ranks; None: not this way."""
        found = None
        if x.dtype in (torch.float16, torch.bfloat16, torch.float32):
            for rows, chunk in self._chosen:
                found = chunk if x.nbytes >= rows * self._row_bytes else found
        return found

    def all_reduce(self, x: torch.Tensor, chunk: int) -> torch.Tensor:
        """x, contiguous, becomes the sum, or a copy of it, where it lies too crookedly."""
        return self._sums.all_reduce(x.clone() if x.data_ptr() % ALIGNED else x, chunk)

    def describe(self, other: str) -> dict[str, Any]:
        """The large ones of Group.describe_reductions; other: the name of the other way."""
        name = "host memory" if self._wire == "exact" else "host memory in 8 bits"
        ways = {
            timing.rows: {other: timing.nccl} | {f"{name}, {c / MIB:g} MiB": s for c, s in timing.host.items()}
            for timing in self.timings
        }
        return {
            "large": f"{name} from {self._chosen[0][0]} rows on" if self._chosen else other,
            "large_why": self._without_kernels if self._chosen else f"{other} is faster here",
            "large_microseconds": {
                rows: {way: round(1e6 * seconds, 1) for way, seconds in each.items()} for rows, each in ways.items()
            },
        }

    def _time(self, group: Group, device: torch.device, rows: int) -> LargeTiming:
        x = torch.zeros(rows, self._row_bytes // self._dtype.itemsize, dtype=self._dtype, device=device)
        works: list[Callable[[], object]] = [partial(group.all_reduce, x)]
        works += [partial(self._sums.all_reduce, x, chunk) for chunk in CHUNKS]
        everyone: list[Any] = group.gather_objects([_seconds(group, work, device) for work in works])
        nccl, *host = (max(values) for values in zip(*everyone, strict=True))
        return LargeTiming(rows, nccl, dict(zip(CHUNKS, host, strict=True)))


def make_large_choice(group: Group, hidden: int, dtype: torch.dtype, wire: WireName) -> LargeChoice | str:
    """Collective: a group's large sums through its host memory, tried and timed; or why there are none."""
    memory = group.host_memory
    if memory is None:
        return group.no_host_memory
    made: list[tuple[CudaLanes, LargeSums]] = []

    reason = first_reason(group, partial(failure_of, lambda: made.append(_make(memory, wire))))
    if reason is not None:
        return reason
    lanes, sums = made[0]
    kernels = ChunkKernels(group.size, memory.device)
    reason = first_reason(group, partial(failure_of, partial(_prepare, kernels, dtype, wire)))
    sums.math = kernels
    reason = reason or _trials(group, lanes, sums, dtype, wire)
    without_kernels = reason
    if reason is not None:
        sums.math = TorchMath()
        reason = _trials(group, lanes, sums, dtype, wire)
    if reason is not None:
        return reason
    choice = LargeChoice(sums, hidden, dtype, wire, without_kernels)
    choice.choose(group, memory.device)
    return choice


def _prepare(kernels: ChunkKernels, dtype: torch.dtype, wire: WireName) -> None:
    kernels.prepare(wire, dtype)
    kernels.prepare("exact", torch.float32)


def _trials(group: Group, lanes: CudaLanes, sums: LargeSums, dtype: torch.dtype, wire: WireName) -> str | None:
    """What is wrong with some sums; None: nothing. The same on all ranks, which therefore all stop at the same one."""
    lanes.flags.limit_ms = -TRIAL_MS
    reason: str | None = None
    for kind, count in ((dtype, 9 * _TRIAL_CHUNK // dtype.itemsize + 77), (torch.float32, 1000), (dtype, 1)):
        reason = reason or first_reason(group, partial(_wrong_sum, group, lanes, sums, kind, count, wire))
    lanes.flags.limit_ms = lanes.flags.patience_ms
    return reason


def _make(memory: HostMemory, wire: WireName) -> tuple[CudaLanes, LargeSums]:
    lanes = CudaLanes(memory)
    sums = LargeSums(lanes, memory, slots=HOST_SLOTS, slot_bytes=HOST_CHUNK_BYTES, wire=wire)
    lanes.place_flags(sums.flags)
    return lanes, sums


def _wrong_sum(
    group: Group, lanes: CudaLanes, sums: LargeSums, dtype: torch.dtype, count: int, wire: WireName
) -> str | None:
    """What is wrong with a sum of random numbers, of which NCCL brings every rank's."""
    device = group.host_memory.device if group.host_memory is not None else None
    random = torch.Generator().manual_seed(group.rank)
    own = torch.randn(1, count, generator=random).to(device, dtype)
    parts = group.all_gather_last(own, [count] * group.size).view(group.size, count)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    found = own.view(-1)
    failure = failure_of(partial(sums.all_reduce, found, _TRIAL_CHUNK))
    digests = group.gather_objects(found.view(torch.uint8).long().sum().item())
    if failure is not None:
        return failure
    if lanes.flags.late:
        return NO_ANSWER
    if wire == "exact" or dtype == torch.float32:
        right = torch.equal(found, total.to(dtype))
    else:
        largest = max(parts.abs().max().item(), total.abs().max().item())
        limit = (group.size + 1) * largest / 254 * 1.01 + torch.finfo(dtype).eps * largest
        right = bool((found.float() - total).abs().max() <= limit) and len(set(digests)) == 1
    return None if right else f"a wrong sum of {count} numbers"


def _seconds(group: Group, work: Callable[[], object], device: torch.device) -> float:
    """Of the fastest call of a few; the first is not timed, and waits for ranks that are late."""
    work()
    group.barrier()
    found = []
    for _ in range(_REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        torch.cuda.synchronize(device)
        found.append(first.elapsed_time(last) / 1e3)
    return min(found)
