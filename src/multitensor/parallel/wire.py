"""How numbers of a large sum travel through the host's memory.

exact: in their own type. q8: as 8-bit integers with a float32 scale for every 32, 1.125 bytes a number: what is written
differs from the number by at most a 254th of the largest of its 32. A sum of two ranks' parts differs by at most what
both do; of more ranks, the sum itself is written once more. Relative to the whole, normally distributed numbers are off
by 0.5%; sums of 2 and 4 ranks whose columns differ in size, with outliers, by 1.1% and 1.5% (measured on a CPU, in
tests/parallel/test_large_sums.py). Numbers that are not finite make all of their 32 so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from multitensor.kernels.cuda.chunks import GROUP, WireName

_MOST = 127


def row_bytes(wire: WireName, length: int, dtype: torch.dtype) -> int:
    """Of a row of `length` numbers, a multiple of GROUP."""
    return length * dtype.itemsize if wire == "exact" else length + length // GROUP * 4


def encode(wire: WireName, rows: torch.Tensor, out: torch.Tensor) -> None:
    """rows: any float [P, length] -> out: uint8 [P, row_bytes]."""
    if wire == "exact":
        out.view(rows.dtype).copy_(rows)
        return
    count, length = rows.shape
    groups = rows.float().view(count, length // GROUP, GROUP)
    scales = groups.abs().amax(dim=-1) / _MOST
    # Where a scale is 0 the codes do not matter.
    codes = (groups / scales.unsqueeze(-1)).round_().clamp_(-_MOST, _MOST)
    out[:, :length].view(torch.int8).view(count, length // GROUP, GROUP).copy_(codes)
    out[:, length:].view(torch.float32).copy_(scales)


def decode(wire: WireName, packed: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """packed: uint8 [P, row_bytes] -> float32 [P, length]. dtype: what `encode` got; the result may share memory with
    `packed` where that is float32."""
    if wire == "exact":
        return packed.view(dtype).float()
    count = packed.shape[0]
    codes = packed[:, :length].view(torch.int8).float().view(count, length // GROUP, GROUP)
    return (codes * packed[:, length:].view(torch.float32).unsqueeze(-1)).view(count, length)


class ChunkMath(Protocol):
    """What is computed of a chunk where it lies. numbers: 16- or 32-bit floats, 1-D, fewer than a row's at the end of a
    tensor. Rows are of `length` numbers, a multiple of GROUP, as the wire writes them."""

    def pack(self, wire: WireName, numbers: torch.Tensor, length: int, rows: torch.Tensor) -> None:
        """numbers, and zeros behind them -> rows: uint8 [R, row_bytes]."""

    def add(
        self,
        wire: WireName,
        numbers: torch.Tensor,
        own: torch.Tensor | None,
        received: torch.Tensor,
        rank: int,
        length: int,
        result: torch.Tensor | None,
    ) -> None:
        """numbers become the sum, in rank order and in float32. Rank `rank`'s part is the row `own`, or None: numbers
        themselves; the other ranks' are the rows of `received`. result: where the sum is written too, as a row; numbers
        become what it then says."""

    def unpack(self, wire: WireName, row: torch.Tensor, length: int, numbers: torch.Tensor) -> None:
        """row: uint8 [row_bytes] -> numbers."""


class TorchMath:
    """ChunkMath by torch's own operations, on any device."""

    def pack(self, wire: WireName, numbers: torch.Tensor, length: int, rows: torch.Tensor) -> None:
        padded = torch.nn.functional.pad(numbers, (0, rows.shape[0] * length - len(numbers)))
        encode(wire, padded.view(-1, length), rows)

    def add(
        self,
        wire: WireName,
        numbers: torch.Tensor,
        own: torch.Tensor | None,
        received: torch.Tensor,
        rank: int,
        length: int,
        result: torch.Tensor | None,
    ) -> None:
        dtype = numbers.dtype
        parts: Sequence[torch.Tensor] = list(decode(wire, received, length, dtype))
        if own is None:
            mine = torch.nn.functional.pad(numbers, (0, length - len(numbers))).float()
        else:
            mine = decode(wire, own.view(1, -1), length, dtype)[0]
        parts = [*parts[:rank], mine, *parts[rank:]]
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        if result is not None:
            encode(wire, (total.to(dtype) if wire == "exact" else total).view(1, -1), result.view(1, -1))
            total = decode(wire, result.view(1, -1), length, dtype)[0]
        numbers.copy_(total[: len(numbers)])

    def unpack(self, wire: WireName, row: torch.Tensor, length: int, numbers: torch.Tensor) -> None:
        numbers.copy_(decode(wire, row.view(1, -1), length, numbers.dtype)[0, : len(numbers)])
