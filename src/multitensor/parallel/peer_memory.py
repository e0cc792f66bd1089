"""A buffer on every rank's GPU that all the other GPUs can read and write, and a way to share it out.

Made for exchanges without flags, fences or barriers: a writer stores float32 values straight into its place in every
reader's buffer, and the reader looks at its own GPU's memory until nothing there is NOTHING any more. NOTHING is -0.0,
so a writer turns -0.0 into +0.0. All of a new buffer is NOTHING; who uses a place again must clear it between.

torch's symmetric memory makes and maps the buffers. NVLink multicast stays off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from multitensor.errors import DoesNotFit

NOTHING = -(1 << 31)  # the bits of -0.0f, as int32: a value that has not come yet
ALIGNMENT = 256
_BLOCK = 2 << 20  # what the driver rounds to anyway


class PeerMemory:
    """One rank's handle.

    rank, size: of the group. local: uint8 [bytes], this rank's buffer. addresses: where every rank's buffer lies as
    this GPU sees it, in rank order, its own included; the same offset in each is the same place, and offset 0 is
    aligned to 256 bytes everywhere. Addresses are good as long as this object lives.
    """

    def __init__(self, rank: int, local: torch.Tensor, addresses: tuple[int, ...], keep: object = None) -> None:
        """keep: whatever holds the mappings. `local` must hold NOTHING on every rank before any rank writes."""
        if local.dtype != torch.uint8 or local.dim() != 1 or not local.is_contiguous():
            raise ValueError("peer memory is one contiguous vector of bytes")
        if not 0 <= rank < len(addresses) or addresses[rank] != local.data_ptr():
            raise ValueError(f"rank {rank}'s own address is not among the {len(addresses)}")
        self.rank, self.size = rank, len(addresses)
        self.local = local
        self.addresses = addresses
        self._keep = keep
        self._used = 0

    @property
    def free(self) -> int:
        """Bytes that are left to carve, alignment aside."""
        return self.local.numel() - self._used

    def carve(self, nbytes: int, alignment: int = ALIGNMENT) -> int:
        """Offset of `nbytes` that nobody else has, in every rank's buffer: all ranks carve the same sizes in the same
        order. Nothing is given back. Raises DoesNotFit."""
        if nbytes < 1 or not 1 <= alignment <= ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"peer memory: cannot give {nbytes} bytes at a multiple of {alignment}")
        offset = -(-self._used // alignment) * alignment
        if offset + nbytes > self.local.numel():
            raise DoesNotFit(f"peer memory: {nbytes} bytes asked for, {self.free} of {self.local.numel()} are left")
        self._used = offset + nbytes
        return offset

    def words(self, offset: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`count` numbers of this rank's own buffer from `offset` on, as a tensor."""
        return self.local[offset : offset + count * dtype.itemsize].view(dtype)

    def table(self, offset: int) -> torch.Tensor:
        """int64 [size] on the device: the address of `offset` in every rank's buffer, for a kernel to look up."""
        return torch.tensor([address + offset for address in self.addresses], dtype=torch.int64).to(self.local.device)


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
