"""A buffer on every rank's GPU that all the other GPUs can read and write: a writer stores straight into every
reader's buffer, and the reader looks at its own GPU's memory (rank_memory.py).

torch's symmetric memory makes and maps the buffers. NVLink multicast stays off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from multitensor.parallel.rank_memory import ALIGNMENT, NOTHING, RankMemory

_BLOCK = 2 << 20  # what the driver rounds to anyway


class PeerMemory(RankMemory):
    """One rank's handle; `local` lies on its GPU."""

    name = "peer memory"

    def __init__(self, rank: int, local: torch.Tensor, addresses: tuple[int, ...], keep: object = None) -> None:
        """keep: whatever holds the mappings."""
        super().__init__(rank, local, addresses, local.device)
        if addresses[rank] != local.data_ptr():
            raise ValueError(f"rank {rank}'s own address is not among the {len(addresses)}")
        self._keep = keep


def open_peer_memory(
    rank: int,
    device: torch.device,
    nbytes: int,
    group: Any,
    share: Callable[[object], list[object]],
    impatient: AbstractContextManager[object],
) -> PeerMemory | str:
    """Collective: makes the buffers and maps them, or says on all ranks why that did not work.

    nbytes: the same on all ranks. group: torch.distributed's, with one rank a GPU. share: one small value a rank -> all
    of them, in rank order. impatient: entered while mapping, when a rank that failed must not be waited for. Only where
    a probe has found peer access to work (peer_probe.py): without it the mapping may end the process.
    """
    opened: tuple[torch.Tensor, list[int], Any] | None = None
    failure: str | None = None
    try:
        with impatient:
            opened = _map(device, nbytes, group)
    except Exception as error:  # of whatever kind: torch's, the driver's, a store that waited in vain
        failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    # Own buffer's offset from what torch calls its address: the same everywhere, or the others' cannot be known.
    shift = opened[0].data_ptr() - opened[1][rank] if opened else 0
    answers: list[Any] = share((failure, shift))
    for number, (reason, _) in enumerate(answers):
        if reason is not None:
            return f"rank {number} could not map the peers' memory ({reason})"
    if opened is None or len({other for _, other in answers}) > 1:
        return "the ranks' buffers do not lie alike in their allocations"
    local, bases, handle = opened
    local.view(torch.int32).fill_(NOTHING)
    torch.cuda.synchronize(device)
    share(None)  # nobody writes before everybody's buffer is NOTHING
    return PeerMemory(rank, local, tuple(base + shift for base in bases), handle)


def _map(device: torch.device, nbytes: int, group: Any) -> tuple[torch.Tensor, list[int], Any]:
    """(own buffer, torch's address of every rank's, what holds the mappings)."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    # Each buffer an allocation of its own, whose address is the buffer's.
    os.environ.setdefault("TORCH_SYMMMEM_IMPLICIT_POOL", "0")
    from torch.distributed import _symmetric_memory as symmetric

    size = -(-(nbytes + ALIGNMENT) // _BLOCK) * _BLOCK
    buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(buffer, group)
    skip = -buffer.data_ptr() % ALIGNMENT
    local = buffer[skip : skip + nbytes // 4 * 4]
    return local, [int(address) for address in handle.buffer_ptrs], (handle, buffer)
