"""Memory of the host that all ranks map, without GPUs: pages are "locked" and "trusted" by the tests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_fakes import run_forked, wait_gone

from multitensor.errors import DoesNotFit
from multitensor.parallel import host_memory
from multitensor.parallel.group import SingleGroup
from multitensor.parallel.host_memory import Check, HostMemory, open_host_memory, section_bytes
from multitensor.parallel.local_group import LocalGroup
from multitensor.parallel.rank_memory import NOTHING
from multitensor.parallel.torch_group import make_torch_group

CPU = torch.device("cpu")


def locked(address: int, nbytes: int) -> int:
    return address


class Lock:
    """Counts what is locked."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def __call__(self, address: int, nbytes: int) -> int:
        self.held.append(address)
        return address

    def undo(self, address: int) -> None:
        self.held.remove(address)


def opened(size: int, lock: Callable[[int], Any] | None = None, check: Check | None = None) -> list[Any]:
    """What every rank's open_host_memory returns. lock: a pair for every rank."""
    ranks = LocalGroup.make(size)
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        pair = lock(rank) if lock else (locked, lambda address: None)
        share = ranks[rank].gather_objects
        results[rank] = open_host_memory(rank, size, CPU, 5000, share, pair, check or (lambda memory: None))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_what_one_rank_writes_all_read(size: int) -> None:
    before = open_files()
    memories = opened(size)
    for memory in memories:
        assert isinstance(memory, HostMemory) and memory.local.numel() == section_bytes(5000) == 8192
        assert bool((memory.local.view(torch.int32) == NOTHING).all())
    offsets = {memory.carve(100) for memory in memories} | {memory.carve(64) for memory in memories}
    assert offsets == {0, 256}
    for rank, memory in enumerate(memories):
        memory.words(256, 16).fill_(rank + 1.5)
    for memory in memories:
        assert [memory.of(r, 256, 64).view(torch.float32).unique().item() for r in range(size)] == [
            r + 1.5 for r in range(size)
        ]
        steps = memory.table(256).diff().unique().tolist()
        assert steps == [8192] and memory.table(256)[memory.rank] == memory.words(256, 16).data_ptr()
        with pytest.raises(DoesNotFit, match="host memory: 8192 bytes asked for"):
            memory.carve(8192)
    for memory in memories:
        memory.close()
        memory.close()
    assert open_files() == before


def test_one_rank_that_cannot_lock_is_everybodys_answer() -> None:
    locks = [Lock() for _ in range(3)]

    def pair(rank: int) -> Any:
        def fails(address: int, nbytes: int) -> int:
            raise RuntimeError("CUDA says CUDA_ERROR_OUT_OF_MEMORY")

        return (fails if rank == 1 else locks[rank]), locks[rank].undo

    before = open_files()
    wanted = "rank 1 could not lock its memory (RuntimeError: CUDA says CUDA_ERROR_OUT_OF_MEMORY)"
    assert opened(3, pair) == [wanted] * 3
    assert open_files() == before
    assert not locks[2].held


def test_memory_that_fails_its_check_is_not_used() -> None:
    locks = [Lock(), Lock()]

    def check(memory: HostMemory) -> None:
        if memory.rank == 0:
            raise RuntimeError("7 words were wrong")

    answers = opened(2, lambda rank: (locks[rank], locks[rank].undo), check)
    assert answers == ["rank 0 could not trust the host's memory (RuntimeError: 7 words were wrong)"] * 2
    assert not locks[0].held and not locks[1].held


def test_ranks_on_two_hosts_share_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_machine", threading.get_ident)
    before = open_files()
    assert opened(2) == ["the ranks are not on one host"] * 2
    assert open_files() == before


def test_another_file_of_that_number_is_not_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    identify = host_memory._identity
    calls: list[int] = []

    def differs(fd: int) -> tuple[int, int]:
        calls.append(fd)
        return (0, len(calls)) if len(calls) > 1 else identify(fd)

    monkeypatch.setattr(host_memory, "_identity", differs)
    for answer in opened(2):
        assert answer.startswith("rank 1 could not map rank 0's memory (ValueError: file ")


def test_without_a_boot_id_no_two_processes_are_on_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(os.getpid()) not in host_memory._machine()
    monkeypatch.setattr(host_memory, "_BOOT_ID", host_memory.Path("/proc/none"))
    assert host_memory._machine() == f"unknown {os.getpid()}"


@pytest.mark.processes
def test_processes_share_it_and_its_maker_may_die_without_leaving_anything() -> None:
    """Rank 0 ends at once, as a killed one would, with nothing closed; the others read what it wrote, and no file has a
    name."""
    size, store = 3, os.memfd_create("store")
    names = set(os.listdir("/dev/shm"))

    def one(rank: int) -> Any:
        group = make_torch_group(rank, size, CPU, f"/proc/self/fd/{store}", "gloo", None)
        lock = (locked, lambda address: None)
        memory = open_host_memory(rank, size, CPU, 5000, group.gather_objects, lock, lambda memory: None)
        assert isinstance(memory, HostMemory), memory
        makers = group.gather_objects(os.getpid())
        memory.words(0, 4).fill_(float(rank + 1))
        if rank == 0:
            return None
        assert wait_gone([int(str(makers[0]))], 20) == []
        deadline = time.monotonic() + 20
        found: list[float] = []
        while time.monotonic() < deadline and found != [1.0, 2.0, 3.0]:
            found = [memory.of(r, 0, 16).view(torch.float32)[0].item() for r in range(size)]
        return found

    try:
        assert run_forked(size, one) == [None, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    finally:
        os.close(store)
    assert set(os.listdir("/dev/shm")) <= names


def test_groups_without_gpus_have_none() -> None:
    for group in (SingleGroup(), LocalGroup.make(2)[0]):
        group.open_host_memory(1 << 20)
        assert group.host_memory is None and group.no_host_memory == "the ranks are not several GPUs"
