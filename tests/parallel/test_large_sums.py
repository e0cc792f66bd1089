"""Large sums through the host's memory, their lanes being threads: what a GPU's streams would do, without one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_fakes import run_forked
from thread_lanes import CPU, ThreadLanes, mailboxes

from multitensor.errors import RankFailed
from multitensor.parallel.host_memory import HostMemory, open_host_memory
from multitensor.parallel.large_sums import LargeSums
from multitensor.parallel.torch_group import make_torch_group
from multitensor.parallel.wire import GROUP, WireName, decode, encode, row_bytes

SLOT_BYTES = 7168  # a multiple of 4 * 64
SLOTS = 4
NBYTES = 2 * SLOTS * SLOT_BYTES + 4096
HALVES = (torch.float16, torch.bfloat16)


def in_threads(size: int, work: Callable[[int], Any]) -> list[Any]:
    """work(rank) in a thread a rank; what it returns, or the error."""
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class World:
    """Ranks with lanes and sums of their own."""

    def __init__(self, size: int, wire: WireName = "exact", shares: bool | None = None, **lanes: Any) -> None:
        self.memories = mailboxes(size, NBYTES)
        self.lanes = [ThreadLanes(memory, **lanes) for memory in self.memories]
        self.sums = [
            LargeSums(lane, memory, slots=SLOTS, slot_bytes=SLOT_BYTES, wire=wire, shares=shares)
            for lane, memory in zip(self.lanes, self.memories, strict=True)
        ]
        for lane, sums in zip(self.lanes, self.sums, strict=True):
            lane.flags = sums.flags

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self.lanes:
            lane.close()


def parts_of(size: int, count: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(count, generator=random) * 3).to(dtype) for _ in range(size)]


def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def all_sums(world: World, cases: list[tuple[list[torch.Tensor], int]]) -> list[list[torch.Tensor]]:
    """By rank, the sum of every case: (parts, bytes of a chunk)."""

    def one(rank: int) -> list[torch.Tensor]:
        found = []
        for parts, chunk_bytes in cases:
            x = parts[rank].clone()
            total = world.sums[rank].all_reduce(x, chunk_bytes)
            assert total is x
            found.append(total.clone())  # whatever is written later is too late
        return found

    results = in_threads(len(world.sums), one)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


# Numbers (one, fewer than a group, whole chunks, more chunks than slots and a rest), bytes of a chunk.
CASES = ((1, SLOT_BYTES), (63, 3600), (448, 2048), (3584, SLOT_BYTES), (9 * 3584 + 17, SLOT_BYTES), (5000, 2048))


@pytest.mark.parametrize("serial", [False, True], ids=["three lanes", "one after another"])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_sums_are_those_in_rank_order_to_the_last_bit(size: int, serial: bool) -> None:
    cases = [
        (parts_of(size, count, dtype, 10 * number + len(str(dtype))), chunk_bytes)
        for dtype in (*HALVES, torch.float32)
        for number, (count, chunk_bytes) in enumerate(CASES)
    ]
    with World(size, serial=serial, delay=0.001) as world:
        for found in all_sums(world, cases):
            for total, (parts, _) in zip(found, cases, strict=True):
                assert torch.equal(total, in_order(parts).to(total.dtype))


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(2, 4),
    shares=st.booleans(),
    serial=st.booleans(),
    wire=st.sampled_from(get_args(WireName)),
    counts=st.lists(st.tuples(st.integers(1, 30000), st.integers(512, SLOT_BYTES)), min_size=1, max_size=4),
    dtype=st.sampled_from([*HALVES, torch.float32]),
)
def test_any_sizes_one_after_another(
    size: int, shares: bool, serial: bool, wire: WireName, counts: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    chunk = size * GROUP * dtype.itemsize  # the smallest that may be asked for
    cases = [(parts_of(size, count, dtype, count), max(nbytes, chunk)) for count, nbytes in counts]
    with World(size, wire, shares, serial=serial) as world:
        results = all_sums(world, cases)
    for found in results[1:]:
        for total, first in zip(found, results[0], strict=True):
            assert torch.equal(total, first)
    for total, (parts, _) in zip(results[0], cases, strict=True):
        wanted = in_order(parts)
        if wire == "exact" or dtype == torch.float32:
            assert torch.equal(total, wanted.to(dtype))
        else:
            # Each part may be off by a 254th of the largest around it, the sum by another, and by its own rounding.
            largest = max(float(part.abs().max()) for part in [*parts, wanted])
            rounding = torch.finfo(dtype).eps * largest
            assert float((total.float() - wanted).abs().max()) <= (size + shares) * largest / 254 * 1.01 + rounding


@pytest.mark.parametrize("size", [2, 3])
def test_a_sum_is_finished_when_the_caller_goes_on(size: int) -> None:
    """What the caller writes into x afterwards stays, and does not reach anybody."""
    with World(size, delay=0.01) as world:

        def one(rank: int) -> list[torch.Tensor]:
            x = torch.full((9000,), float(rank + 1))
            found = []
            for turn in range(6):
                x.fill_(float(rank + 1 + turn))
                world.sums[rank].all_reduce(x)
                found.append(x.clone())
                x.fill_(-1000.0)
            time.sleep(0.05)
            return [*found, x]

        for found in in_threads(size, one):
            *sums, last = found
            assert [total.unique().tolist() for total in sums] == [
                [float(sum(rank + 1 + turn for rank in range(size)))] for turn in range(6)
            ]
            assert last.unique().tolist() == [-1000.0]


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_is_gone_is_an_error_and_no_hang(size: int, shares: bool) -> None:
    with World(size, shares=shares) as world:

        def one(rank: int) -> Any:
            for turn in range(4):
                if rank == size - 1 and turn == 2:
                    for lanes in world.lanes:
                        lanes.patience = 1.0
                    return "gone"
                world.sums[rank].all_reduce(torch.ones(50000))
            return "finished"

        began = time.monotonic()
        results = in_threads(size, one)
        assert results[-1] == "gone" and time.monotonic() - began < 60
        assert all(isinstance(result, RankFailed) for result in results[:-1]), results


@pytest.mark.processes
def test_processes_sum_until_one_is_killed() -> None:
    """Memory opened as the ranks of a group do; the last rank kills itself in the middle, and the others' waits end."""
    size, store = 3, os.memfd_create("store")

    def one(rank: int) -> Any:
        group = make_torch_group(rank, size, CPU, f"/proc/self/fd/{store}", "gloo", None)
        lock = (lambda address, nbytes: address), (lambda address: None)
        memory = open_host_memory(rank, size, CPU, NBYTES, group.gather_objects, lock, lambda memory: None)
        assert isinstance(memory, HostMemory), memory
        lanes = ThreadLanes(memory)
        sums = LargeSums(lanes, memory, slots=SLOTS, slot_bytes=SLOT_BYTES)
        lanes.flags = sums.flags
        group.barrier()
        for turn in range(3):
            parts = parts_of(size, 30001, torch.float16, turn)
            assert torch.equal(sums.all_reduce(parts[rank].clone()), in_order(parts).half())
        if rank == size - 1:
            if os.fork() == 0:  # answers for the rank, which does not live to
                return "killed"
            os.kill(os.getpid(), signal.SIGKILL)
        lanes.patience = 3.0
        began = time.monotonic()
        with pytest.raises(RankFailed):
            sums.all_reduce(torch.ones(50000, dtype=torch.float16))
        return time.monotonic() - began < 30

    try:
        assert run_forked(size, one) == [True, True, "killed"]
    finally:
        os.close(store)


def test_nothing_to_sum_and_senseless_chunks() -> None:
    with World(2) as world:
        assert world.sums[0].all_reduce(torch.empty(0, 8)).shape == (0, 8)
        for nbytes in (100, SLOT_BYTES + 256):
            with pytest.raises(ValueError, match="chunks of"):
                world.sums[0].all_reduce(torch.ones(8), nbytes)
    memory = mailboxes(2, NBYTES)[0]
    with pytest.raises(ValueError, match="slots"):
        LargeSums(world.lanes[0], memory, slots=3, slot_bytes=SLOT_BYTES)


@given(
    rows=st.integers(1, 3),
    groups=st.integers(1, 4),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 6e4]),
    dtype=st.sampled_from([*HALVES, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_eight_bits_are_off_by_a_254th_of_the_largest_around(
    rows: int, groups: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    numbers = (torch.rand(rows, groups * GROUP, generator=random) * 2 - 1).mul_(scale).to(dtype)
    numbers[:, 5::9] = 0.0
    packed = torch.full((rows, row_bytes("q8", groups * GROUP, dtype)), 77, dtype=torch.uint8)
    encode("q8", numbers, packed)
    error = (decode("q8", packed, groups * GROUP, dtype) - numbers.float()).abs().view(rows, groups, GROUP)
    largest = numbers.float().abs().view(rows, groups, GROUP).amax(-1, keepdim=True)
    assert bool((error <= largest / 254 * (1 + 1e-5)).all())
    assert packed.shape[1] == groups * GROUP * 9 // 8


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    numbers = torch.zeros(1, 3 * GROUP)
    numbers[0, GROUP + 3] = float("inf")
    numbers[0, 2 * GROUP + 5] = float("nan")
    packed = torch.empty(1, row_bytes("q8", 3 * GROUP, numbers.dtype), dtype=torch.uint8)
    encode("q8", numbers, packed)
    found = decode("q8", packed, 3 * GROUP, numbers.dtype).view(3, GROUP)
    assert found[0].abs().max() == 0.0
    assert not found[1:].isfinite().any()


@pytest.mark.parametrize("size", [2, 4])
def test_error_of_eight_bits_on_activations(size: int) -> None:
    """Partial sums as layers make them: columns of very different sizes, a few of them outliers."""
    random = torch.Generator().manual_seed(3)
    columns = torch.exp(torch.randn(2048, generator=random))
    columns[torch.randint(0, 2048, (8,), generator=random)] *= 50
    parts = [(torch.randn(96, 2048, generator=random) * columns).to(torch.float16) for _ in range(size)]
    with World(size, "q8") as world:
        found = all_sums(world, [([part.flatten() for part in parts], SLOT_BYTES)])
    wanted = torch.stack([part.double() for part in parts]).sum(0).flatten()
    error = float((found[0][0].double() - wanted).norm() / wanted.norm())
    print(f"{size} ranks: relative error {error:.2e}")
    assert 1e-4 < error < 2e-2
