"""A piece of memory for every rank that all ranks' GPUs reach, and a way to share it out.

Made for exchanges without flags, fences or barriers: a writer stores float32 values where its readers look, and a
reader looks until nothing there is NOTHING any more. NOTHING is -0.0, so a writer turns -0.0 into +0.0. All of a new
piece is NOTHING; who uses a place again must clear it between.
"""

from __future__ import annotations

import torch

from multitensor.errors import DoesNotFit

NOTHING = -(1 << 31)  # the bits of -0.0f, as int32: a value that has not come yet
ALIGNMENT = 256


class RankMemory:
    """One rank's handle.

    rank, size: of the group. local: uint8 [bytes], this rank's piece. addresses: where every rank's piece lies as this
    rank's GPU sees it, in rank order, its own included; the same offset in each is the same place, and offset 0 is
    aligned to 256 bytes everywhere. device: that GPU. Addresses are good as long as this object lives.
    """

    name = "shared memory"

    def __init__(self, rank: int, local: torch.Tensor, addresses: tuple[int, ...], device: torch.device) -> None:
        """`local` must hold NOTHING on every rank before any rank writes."""
        if local.dtype != torch.uint8 or local.dim() != 1 or not local.is_contiguous():
            raise ValueError(f"{self.name} is one contiguous vector of bytes")
        if not 0 <= rank < len(addresses):
            raise ValueError(f"rank {rank}'s own address is not among the {len(addresses)}")
        self.rank, self.size = rank, len(addresses)
        self.local = local
        self.addresses = addresses
        self.device = device
        self._used = 0

    @property
    def free(self) -> int:
        """Bytes that are left to carve, alignment aside."""
        return self.local.numel() - self._used

    def carve(self, nbytes: int, alignment: int = ALIGNMENT) -> int:
        """Offset of `nbytes` that nobody else has, in every rank's piece: all ranks carve the same sizes in the same
        order. Nothing is given back. Raises DoesNotFit."""
        if nbytes < 1 or not 1 <= alignment <= ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"{self.name}: cannot give {nbytes} bytes at a multiple of {alignment}")
        offset = -(-self._used // alignment) * alignment
        if offset + nbytes > self.local.numel():
            raise DoesNotFit(f"{self.name}: {nbytes} bytes asked for, {self.free} of {self.local.numel()} are left")
        self._used = offset + nbytes
        return offset

    def words(self, offset: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`count` numbers of this rank's own piece from `offset` on, as a tensor."""
        return self.local[offset : offset + count * dtype.itemsize].view(dtype)

    def table(self, offset: int) -> torch.Tensor:
        """int64 [size] on the device: the address of `offset` in every rank's piece, for a kernel to look up."""
        return torch.tensor([address + offset for address in self.addresses], dtype=torch.int64).to(self.device)
