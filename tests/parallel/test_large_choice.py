"""When sums of many rows go through the host's memory, and how a way that sums wrongly is found out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import inline_streams
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_lanes import ThreadLanes, mailboxes

from multitensor.parallel import large_choice
from multitensor.parallel.large_choice import (
    CHUNKS,
    ROWS,
    LargeChoice,
    LargeTiming,
    _wrong_sum,
    decide,
    make_large_choice,
)
from multitensor.parallel.large_sums import LargeSums
from multitensor.parallel.local_group import LocalGroup
from multitensor.parallel.trials import failure_of, first_reason
from multitensor.parallel.wire import TorchMath, WireName
from multitensor.sharding.memory import HOST_CHUNK_BYTES, HOST_SLOTS, MIB

SLOT_BYTES = 1 << 17  # what trials use
HALF = torch.float16


def test_from_the_rows_on_where_it_is_faster_for_good() -> None:
    small, large = CHUNKS
    timings = [
        LargeTiming(128, 90e-6, {small: 80e-6, large: 85e-6}),
        LargeTiming(512, 200e-6, {small: 250e-6, large: 210e-6}),
        LargeTiming(2048, 900e-6, {small: 500e-6, large: 400e-6}),
    ]
    assert decide(timings) == [(2048, large)]
    timings[1] = LargeTiming(512, 200e-6, {small: 150e-6, large: 190e-6})
    assert decide(timings) == [(128, small), (512, small), (2048, large)]
    assert decide([*timings[:2], LargeTiming(2048, 300e-6, {small: 500e-6})]) == []


seconds = st.floats(1e-6, 1e-2)


@given(st.lists(st.tuples(seconds, seconds, seconds), min_size=len(ROWS), max_size=len(ROWS)))
def test_what_is_chosen_was_never_slower(table: list[tuple[float, float, float]]) -> None:
    timings = [
        LargeTiming(n, nccl, dict(zip(CHUNKS, own, strict=True))) for n, (nccl, *own) in zip(ROWS, table, strict=True)
    ]
    chosen = decide(timings)
    assert [rows for rows, _ in chosen] == list(ROWS[len(ROWS) - len(chosen) :])
    by_rows = {timing.rows: timing for timing in timings}
    assert all(by_rows[rows].host[chunk] < by_rows[rows].nccl for rows, chunk in chosen)


def test_which_tensors_go_that_way() -> None:
    choice = LargeChoice(Any, 64, HALF, "exact")  # type: ignore[arg-type]
    assert choice.chunk_for(torch.empty(4096, 64, dtype=HALF)) is None
    assert choice.describe("NCCL") == {"large": "NCCL", "large_why": "NCCL is faster here", "large_microseconds": {}}
    choice._chosen = [(128, 1), (512, 2)]
    rows = {127: None, 128: 1, 511: 1, 512: 2, 9000: 2}
    assert {n: choice.chunk_for(torch.empty(n, 64, dtype=HALF)) for n in rows} == rows
    assert choice.chunk_for(torch.empty(64, 64)) == 1  # twice the bytes a number
    assert choice.chunk_for(torch.empty(9000, 64, dtype=torch.int64)) is None
    assert choice.describe("NCCL")["large"] == "host memory from 128 rows on"


class Forgetful(TorchMath):
    """Rank 1 leaves out a rank's part of the second chunk."""

    def __init__(self) -> None:
        self.chunks = 0

    def add(self, wire: Any, numbers: Any, own: Any, received: torch.Tensor, rank: int, *rest: Any) -> None:
        self.chunks += 1
        missing = self.chunks == 2 and rank == 1
        super().add(wire, numbers, own, received.new_zeros(received.shape) if missing else received, rank, *rest)


def trial(kind: type[TorchMath], size: int, wire: WireName, late: int = 0) -> list[str | None]:
    """What every rank says of a trial sum, its lanes being threads."""
    groups, memories = LocalGroup.make(size), mailboxes(size, 8 * SLOT_BYTES + 4096)
    lanes = [ThreadLanes(memory) for memory in memories]

    def one(rank: int) -> str | None:
        groups[rank].host_memory = memories[rank]
        sums = LargeSums(lanes[rank], memories[rank], slots=4, slot_bytes=SLOT_BYTES, wire=wire)
        sums.math = kind()
        lanes[rank].flags = sums.flags
        groups[rank].barrier()
        watch: Any = SimpleNamespace(flags=SimpleNamespace(late=late))
        return first_reason(groups[rank], lambda: _wrong_sum(groups[rank], watch, sums, HALF, 70000 * size, wire))

    try:
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(one, range(size)))
    finally:
        for lane in lanes:
            lane.close()


@pytest.mark.parametrize("wire", ["exact", "q8"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_trial_passes_what_is_right(size: int, wire: WireName) -> None:
    assert trial(TorchMath, size, wire) == [None] * size


@pytest.mark.parametrize("wire", ["exact", "q8"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_trial_finds_what_is_wrong(size: int, wire: WireName) -> None:
    found = trial(Forgetful, size, wire)
    assert len(set(found)) == 1 and "got a wrong sum of" in str(found[0])


def test_a_trial_that_waited_in_vain() -> None:
    assert trial(TorchMath, 2, "exact", late=1) == ["through host memory rank 0 got no answer within 2 s"] * 2


def test_failures_are_one_line() -> None:
    def fails() -> None:
        raise RuntimeError("no\n  compiler")

    assert failure_of(fails) == "RuntimeError: no compiler"
    assert failure_of(lambda: None) is None


class Kernels(TorchMath):
    """Stands for ChunkKernels, which fail in a way of their own."""

    fault = ""

    def __init__(self, ranks: int, device: torch.device) -> None:
        pass

    def prepare(self, wire: WireName, dtype: torch.dtype) -> None:
        if self.fault == "cannot be compiled":
            raise RuntimeError("no compiler")

    def add(self, wire: WireName, numbers: torch.Tensor, *rest: Any) -> None:
        if self.fault == "cannot be launched":
            raise RuntimeError("no such launch")
        super().add(wire, numbers, *rest)
        if self.fault == "wrong":
            numbers[-1:] += 1


def made(size: int, wire: WireName, nbytes: int = 2 * HOST_SLOTS * HOST_CHUNK_BYTES + MIB) -> list[LargeChoice | str]:
    """What every rank's make_large_choice returns, its streams doing all at once."""
    groups = LocalGroup.make(size)
    for group, memory in zip(groups, mailboxes(size, nbytes), strict=True):
        group.host_memory = memory
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda group: make_large_choice(group, 256, HALF, wire), groups))


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    inline_streams.install(monkeypatch)
    monkeypatch.setattr(large_choice, "ChunkKernels", Kernels)
    monkeypatch.setattr(large_choice, "ROWS", (4, 300))
    return monkeypatch


@pytest.mark.parametrize("wire", ["exact", "q8"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_choice_is_tried_and_timed(size: int, wire: WireName, inline: pytest.MonkeyPatch) -> None:
    choices = made(size, wire)
    assert len({str(choice.describe("NCCL")) for choice in choices if isinstance(choice, LargeChoice)}) == 1
    for choice in choices:
        assert isinstance(choice, LargeChoice)
        assert [timing.rows for timing in choice.timings] == [4, 300]
        assert {tuple(timing.host) for timing in choice.timings} == {CHUNKS}

    def one(rank: int) -> bool:
        choice, numbers = choices[rank], torch.full((1001,), rank + 1.0, dtype=HALF)
        assert isinstance(choice, LargeChoice)
        crooked = choice.all_reduce(numbers[1:], CHUNKS[0])
        return crooked.data_ptr() != numbers[1:].data_ptr() and bool((crooked == sum(range(1, size + 1))).all())

    with ThreadPoolExecutor(size) as pool:
        assert all(pool.map(one, range(size)))


@pytest.mark.parametrize("fault", ["cannot be compiled", "cannot be launched", "wrong"])
def test_without_kernels_torch_does_it(fault: str, inline: pytest.MonkeyPatch) -> None:
    inline.setattr(Kernels, "fault", fault)
    for choice in made(2, "exact"):
        assert isinstance(choice, LargeChoice)
        choice._chosen = [(4, CHUNKS[0])]
        assert str(choice.describe("NCCL")["large_why"]).startswith("through host memory rank 0 got ")


def test_what_fails_both_ways_is_not_used(inline: pytest.MonkeyPatch) -> None:
    inline.setattr(large_choice, "TorchMath", Forgetful)
    inline.setattr(Kernels, "fault", "wrong")
    (reason, other) = made(2, "exact")
    assert isinstance(reason, str) and "a wrong sum of" in reason and reason == other


def test_too_little_memory_is_a_reason(inline: pytest.MonkeyPatch) -> None:
    (reason, other) = made(2, "exact", nbytes=MIB)
    assert isinstance(reason, str) and "host memory: " in reason and reason == other
    assert make_large_choice(LocalGroup.make(1)[0], 256, HALF, "exact") == "the ranks are not several GPUs"
