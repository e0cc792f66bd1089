"""Page-locked memory of the host that all ranks of it map and all their GPUs reach, for GPUs that do not reach each
other's memory. Every rank has a section, its mailbox (rank_memory.py): it writes there, once for all, and the others'
GPUs look there until the words have come.

So a rank clears its own places, and may do so only when all others have read them. Say turn k uses set k % 3, and turns
follow one another on one stream in all ranks. A word of turn k from another rank tells that its turn k - 1 is over,
reading included: whoever has seen a word of turn k from every other rank may clear what it sent in turn k - 1. Who has
not, knows of all ranks' turn k - 2 alone, and needs four sets. A cleared place is read again two turns later, after a
word of this rank's next turn, which it sends when the clearing launch is over.

The memory has no name (a memfd), so that nothing is left behind however the ranks end. A new one is believed in after
every GPU has written into its mailbox and every other has read what it wrote, many times over (probe.cu).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from multitensor.parallel.rank_memory import ALIGNMENT, NOTHING, RankMemory
from multitensor.parallel.shared_region import SharedRegion

_PAGE = 4096
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CHECKED_WORDS = 1 << 14  # of four bytes, of every mailbox; each is written _ROUNDS times
_ROUNDS = 20
_ARRIVAL_MS = 5000  # in which all of them have to come
_BLOCKS, _THREADS = 16, 256

Share = Callable[[object], list[Any]]
Lock = Callable[[int, int], int]  # (address, bytes) in this process -> address as this rank's GPU sees it
Unlock = Callable[[int], object]  # address in this process
Check = Callable[["HostMemory"], None]  # raises where a new memory is not to be trusted
_Result = TypeVar("_Result")


class HostMemory(RankMemory):
    """One rank's handle; `local` is its mailbox, a CPU tensor."""

    name = "host memory"

    def __init__(
        self,
        rank: int,
        size: int,
        region: SharedRegion,
        address: int,
        device: torch.device,
        unlock: Callable[[], object] = lambda: None,
    ) -> None:
        """region: `size` mailboxes, one behind the other. address: where it begins as this rank's GPU sees it.
        unlock: undoes what made that so."""
        nbytes = region.size // size
        if nbytes % ALIGNMENT or address % ALIGNMENT:
            raise ValueError(f"mailboxes of {nbytes} bytes from address {address} on are not aligned to {ALIGNMENT}")
        self._mailboxes = torch.frombuffer(region.map, dtype=torch.uint8).view(size, nbytes)
        super().__init__(rank, self._mailboxes[rank], tuple(address + r * nbytes for r in range(size)), device)
        self._region, self._unlock = region, unlock

    def of(self, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of a rank's mailbox, from `offset` on, as this process sees it: for copies."""
        return self._mailboxes[rank, offset : offset + nbytes]

    def close(self) -> None:
        """No GPU may use it any more. Safe to call twice; addresses become unusable."""
        unlock, self._unlock = self._unlock, lambda: None
        unlock()
        self.local = self._mailboxes = torch.empty(0, dtype=torch.uint8)
        self._region.close()


def section_bytes(nbytes: int) -> int:
    """What a mailbox of at least so many bytes takes: whole pages, so that each lies near its own GPU."""
    return -(-nbytes // _PAGE) * _PAGE


def open_host_memory(
    rank: int,
    size: int,
    device: torch.device,
    nbytes: int,
    share: Share,
    lock: tuple[Lock, Unlock] | None = None,
    check: Check | None = None,
) -> HostMemory | str:
    """Collective: memory with a mailbox of at least `nbytes` for every rank, or on all ranks why there is none.

    share: one small value a rank -> all of them, in rank order. lock: locks pages for the GPUs, and unlocks them (the
    default: the CUDA driver does). check: the default lets every GPU write and read.
    """
    lock_pages, unlock_pages = lock or (_lock, _unlock)
    with contextlib.ExitStack() as undo:
        try:
            region = _common_region(rank, size * section_bytes(nbytes), share)
            undo.callback(region.close)
            own = torch.frombuffer(region.map, dtype=torch.int32).view(size, -1)[rank]
            own.fill_(NOTHING)  # the rank that uses the pages touches them first: so they lie near it
            del own
            start = region.address

            def lock_all() -> int:
                address = lock_pages(start, region.size)
                undo.callback(unlock_pages, start)
                return address

            address = _together(share, "lock its memory", lock_all)
            memory = HostMemory(rank, size, region, address, device, partial(unlock_pages, start))
            _together(share, "trust the host's memory", lambda: (check or check_by_gpu)(memory))
        except _Refused as refusal:
            return str(refusal)
        undo.pop_all()
    memory.local.view(torch.int32).fill_(NOTHING)
    share(None)  # nobody writes before everybody's mailbox is NOTHING
    return memory


def check_by_gpu(memory: HostMemory) -> None:
    """Every GPU writes rounds of words into its mailbox and reads the others', with a time limit. Collective: all ranks
    call it at about the same time. Raises RuntimeError unless every word came as it was written."""
    from multitensor.kernels.cuda.program import Program, launch

    words = min(_CHECKED_WORDS, memory.local.numel() // 8)
    kernel = Program("probe.cu", {}, memory.device).kernel("mailboxes")
    verdict = torch.zeros(2, dtype=torch.int32, device=memory.device)
    arguments = (memory.table(0), verdict, _ARRIVAL_MS, memory.rank, memory.size, words, _ROUNDS)
    launch(kernel, _BLOCKS, _THREADS, 0, arguments)
    wrong, missing = verdict.tolist()
    if wrong or missing:
        raise RuntimeError(f"{wrong} words were wrong, {missing} did not come within {_ARRIVAL_MS / 1000:g} s")


class _Refused(Exception):
    """Why there is no host memory, the same on all ranks."""


def _together(share: Share, what: str, attempt: Callable[[], _Result]) -> _Result:
    """Collective: what `attempt` returns, where it succeeds on all ranks; else raises _Refused on all."""
    result: _Result | None = None
    failure: str | None = None
    try:
        result = attempt()
    except Exception as error:  # of whatever kind: the system's, the driver's
        failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    for number, reason in enumerate(share(failure)):
        if reason is not None:
            raise _Refused(f"rank {number} could not {what} ({reason})")
    return cast(_Result, result)


def _common_region(rank: int, nbytes: int, share: Share) -> SharedRegion:
    """Rank 0 makes it, the others map what rank 0 holds."""
    made = _together(share, "make the host's memory", lambda: _create(nbytes) if rank == 0 else None)
    answers: list[Any] = share((_machine(), os.getpid(), *((made.fd, _identity(made.fd)) if made else (-1, None))))
    try:
        if len({machine for machine, *_ in answers}) > 1:
            raise _Refused("the ranks are not on one host")
        _, process, fd, identity = answers[0]
        return _together(share, "map rank 0's memory", lambda: made or _join(process, fd, identity))
    except _Refused:
        if made is not None:
            made.close()
        raise


def _create(nbytes: int) -> SharedRegion:
    return SharedRegion.create("host-memory", nbytes)


def _machine() -> str:
    """Differs between hosts that run; processes with the same see the same files in /proc."""
    with contextlib.suppress(OSError):
        return f"{_BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return f"unknown {os.getpid()}"


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _join(process: int, number: int, identity: tuple[int, int]) -> SharedRegion:
    """Maps what another process holds. Raises OSError, ValueError where that is not the file that is meant."""
    fd = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    if _identity(fd) != identity:
        os.close(fd)
        raise ValueError(f"file {number} of process {process} is another")
    return SharedRegion(fd)


def _lock(address: int, nbytes: int) -> int:
    from cuda.bindings import driver

    flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
    _ask(driver.cuMemHostRegister(address, nbytes, flags))
    return int(_ask(driver.cuMemHostGetDevicePointer(address, 0)))


def _unlock(address: int) -> None:
    from cuda.bindings import driver

    _ask(driver.cuMemHostUnregister(address))


def _ask(answer: Any) -> Any:
    """The value of a driver call that returns (error, value) or (error,). Raises RuntimeError."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"CUDA says {error.name}")
    return values[0] if values else None
