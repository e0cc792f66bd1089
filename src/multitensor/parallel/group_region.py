"""The layout of the shared memory in which CPU ranks reduce (never imports torch: the engine creates it).

line 0                  abort word (uint32, at 0), number of ranks (uint32, at 4), bytes a slot (uint64, at 8)
line 1                  counter (uint32): the last phase that all ranks have finished writing
line 2 + r              rank r's counter (uint32): how many phases of collectives it has finished writing
page-aligned, 2 a rank  slots: rank r's contribution, used in turn
"""

from __future__ import annotations

from dataclasses import dataclass

from multitensor.parallel.shared_region import LINE, SharedRegion

DEFAULT_SLOT_BYTES = 1 << 20
_PAGE = 4096


@dataclass(frozen=True)
class GroupLayout:
    """Offsets in bytes for `size` ranks of two slots of `slot_bytes` each."""

    size: int
    slot_bytes: int

    @property
    def first_slot(self) -> int:
        return -(-(LINE * (2 + self.size)) // _PAGE) * _PAGE

    @property
    def total_bytes(self) -> int:
        return self.first_slot + 2 * self.size * self.slot_bytes

    @property
    def all_here(self) -> int:
        return LINE

    def counter(self, rank: int) -> int:
        return LINE * (2 + rank)

    def slot(self, rank: int, turn: int) -> int:
        """turn: 0 or 1."""
        return self.first_slot + (2 * rank + turn) * self.slot_bytes


def create_group_region(size: int, slot_bytes: int = DEFAULT_SLOT_BYTES) -> SharedRegion:
    """Fresh memory for a SharedMemoryGroup of `size` ranks. slot_bytes: a multiple of 4096; larger tensors travel in
    pieces of that size."""
    if size < 1 or slot_bytes < _PAGE or slot_bytes % _PAGE:
        raise ValueError(f"cannot lay out {size} ranks with slots of {slot_bytes} bytes")
    layout = GroupLayout(size, slot_bytes)
    region = SharedRegion.create("group", layout.total_bytes)
    region.view(0, 8, "I")[1] = size
    region.view(8, 8, "Q")[0] = slot_bytes
    return region


def read_layout(region: SharedRegion) -> GroupLayout:
    """The layout that `create_group_region` wrote."""
    return GroupLayout(region.view(0, 8, "I")[1], region.view(8, 8, "Q")[0])


def abort_group(region: SharedRegion) -> None:
    """Makes every rank that waits in the group, or will, raise RankFailed (within 50 ms)."""
    region.view(0, 4, "I")[0] = 1
