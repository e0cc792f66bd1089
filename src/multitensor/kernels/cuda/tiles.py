"""Planes -> tiles: 16 rows x one super-block (256 columns) in one contiguous run, in the order of mma fragments.

`gemv.cu` defines the layout; this packs it with torch ops (any device), a few row groups at a time. Not a bit of a
weight changes. Columns before the slice's first (its phase) and after its last, and rows past the last, are padded with
zero scales, so they add nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from multitensor.kernels.packing import unpack_fields, unpack_nibbles
from multitensor.kernels.quant_tensor import QuantTensor

ROWS = 16
COLUMNS = 256

# Bytes of one tile: quants, then scales and factors.
TILE_BYTES = {
    "Q4_0": 2048 + 256,
    "Q4_1": 2048 + 512,
    "Q5_0": 2560 + 256,
    "Q5_1": 2560 + 512,
    "Q8_0": 4096 + 256,
    "Q2_K": 1024 + 256 + 64,
    "Q3_K": 1536 + 256 + 32,
    "Q4_K": 2048 + 256 + 64,
    "Q5_K": 2560 + 256 + 64,
    "Q6_K": 3072 + 256 + 32,
    "IQ4_NL": 2048 + 256,
    "IQ4_XS": 2048 + 128 + 32,
    "MXFP4": 2048 + 128,
}
_PACKED_WEIGHTS = 24 << 20  # at a time: bounds the scratch, of up to ten bytes a weight


Expander = Callable[["TiledTensor", "slice | torch.Tensor | None"], torch.Tensor]


@dataclass(frozen=True)
class TiledTensor(QuantTensor):
    """A QuantTensor whose one plane is "tiles": uint8 [row groups, column blocks, tile bytes].

    expander makes numbers of it where something else than the matrix kernels asks for them.
    """

    expander: Expander | None = None

    @cached_property
    def tiles(self) -> torch.Tensor:
        return self.planes["tiles"]

    @cached_property
    def column_blocks(self) -> int:
        return self.tiles.shape[1]

    def expanded(self, rows: slice | torch.Tensor | None) -> torch.Tensor | None:
        return None if self.expander is None else self.expander(self, rows)


def pair_of_types(weights: Sequence[TiledTensor]) -> tuple[tuple[str, str], int]:
    """The two types that the weights have (the same twice where there is one), and a bit a weight of the second."""
    names = [w.type.name for w in weights]
    other = next((name for name in names if name != names[0]), names[0])
    return (names[0], other), sum(1 << i for i, name in enumerate(names) if name != names[0])


def to_tiles(w: QuantTensor, expander: Expander | None = None) -> TiledTensor:
    """Packs a slice of one of the types in TILE_BYTES."""
    groups, blocks = -(-w.rows // ROWS), -(-(w.phase + w.cols) // COLUMNS)
    tiles = torch.empty((groups, blocks, TILE_BYTES[w.type.name]), dtype=torch.uint8, device=w.device)
    step = max(1, _PACKED_WEIGHTS // (ROWS * COLUMNS * blocks))
    for first in range(0, groups, step):
        count = min(step, groups - first)
        tiles[first : first + count] = _pack(w, first * ROWS, count, blocks)
    return TiledTensor(w.type, w.rows, w.cols, {"tiles": tiles}, w.phase, expander)


def _pack(w: QuantTensor, row: int, groups: int, blocks: int) -> torch.Tensor:
    rows = slice(row, min(row + groups * ROWS, w.rows))
    planes = {name: plane[rows] for name, plane in w.planes.items()}
    chunk = _Chunk(planes, groups, blocks, w.phase, w.cols)
    quants, scales = _LAYOUTS[w.type.name]
    return torch.cat([*(part(chunk) for part in quants), *(part(chunk) for part in scales)], dim=-1)


class _Chunk:
    """Some row groups' planes, padded to whole groups and super-blocks."""

    def __init__(self, planes: dict[str, torch.Tensor], groups: int, blocks: int, phase: int, cols: int) -> None:
        self.planes, self.groups, self.blocks, self.phase, self.cols = planes, groups, blocks, phase, cols

    def padded(self, values: torch.Tensor, per_block: int, phase: int) -> torch.Tensor:
        """[rows, items] -> [groups, 16, blocks, per_block], zeros before `phase` items and after the last."""
        full = torch.zeros((self.groups * ROWS, self.blocks * per_block), dtype=values.dtype, device=values.device)
        full[: values.shape[0], phase : phase + values.shape[1]] = values
        return full.view(self.groups, ROWS, self.blocks, per_block)

    def weights(self, values: torch.Tensor) -> torch.Tensor:
        """One uint8 a weight [rows, cols] -> axes [group, r, g, block, j, p, half, c, i]: row 8 r + g of the group,
        column 64 j + 32 p + 16 half + 4 c + i of the super-block."""
        full = self.padded(values, COLUMNS, self.phase)
        return full.view(self.groups, 2, 8, self.blocks, 4, 2, 2, 4, 4)

    def per_row(self, name: str, weights: int) -> torch.Tensor:
        """A plane of one item every `weights` weights -> its bytes [group, block, 16 rows, bytes of a super-block]."""
        per_block = COLUMNS // weights
        values = self.padded(self.planes[name], per_block, self.phase // weights if weights < COLUMNS else 0)
        return values.permute(0, 2, 1, 3).contiguous().view(torch.uint8)

    def flat(self, per_row: torch.Tensor) -> torch.Tensor:
        return per_row.reshape(self.groups, self.blocks, -1)


Part = Callable[[_Chunk], torch.Tensor]


def _nibble_words(chunk: _Chunk, values: torch.Tensor) -> torch.Tensor:
    """[j][lane][p, r][i]: low nibble half 0, high nibble half 1."""
    v = chunk.weights(values & 15).permute(0, 3, 4, 2, 7, 5, 1, 8, 6)
    return (v[..., 0] | (v[..., 1] << 4)).reshape(chunk.groups, chunk.blocks, -1)


def _nibbles(group: int) -> Part:
    return lambda chunk: _nibble_words(chunk, unpack_nibbles(chunk.planes["quants"], group))


def _bits(chunk: _Chunk) -> torch.Tensor:
    """[lane][j][i]: bit 4 p + 2 r + half of each byte."""
    v = chunk.weights(unpack_fields(chunk.planes["high"], 1)).permute(0, 3, 2, 7, 4, 8, 5, 1, 6)
    return _weighted(v.flatten(-3), 1).reshape(chunk.groups, chunk.blocks, -1)


def _pairs(name: str) -> Part:
    def pack(chunk: _Chunk) -> torch.Tensor:
        """[j / 2][lane][j % 2, r][i]: bits 2 (2 p + half) of each byte."""
        v = chunk.weights(unpack_fields(chunk.planes[name], 2)).unflatten(4, (2, 2))
        v = v.permute(0, 3, 4, 2, 8, 5, 1, 9, 6, 7)
        return _weighted(v.flatten(-2), 2).reshape(chunk.groups, chunk.blocks, -1)

    return pack


def _weighted(fields: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., n] of `width`-bit numbers -> [...]: number t at bit t * width."""
    total = fields[..., 0].clone()
    for t in range(1, fields.shape[-1]):
        total |= fields[..., t] << (t * width)
    return total


def _bytes(chunk: _Chunk) -> torch.Tensor:
    """[j][p][lane][half, r][i]"""
    v = chunk.weights(chunk.planes["quants"].view(torch.uint8)).permute(0, 3, 4, 5, 2, 7, 6, 1, 8)
    return v.reshape(chunk.groups, chunk.blocks, -1)


def _plane(name: str, weights: int) -> Part:
    return lambda chunk: chunk.flat(chunk.per_row(name, weights))


def _beside(first: str, second: str, weights: int) -> Part:
    """Two planes interleaved by row: scales then mins, d then dmin."""
    return lambda chunk: chunk.flat(torch.cat((chunk.per_row(first, weights), chunk.per_row(second, weights)), dim=-1))


_SUPER = _plane("d", 256)
_SUPER_MINIMUM = _beside("d", "dmin", 256)
_LAYOUTS = {
    "Q4_0": ((_nibbles(32),), (_plane("d", 32),)),
    "Q4_1": ((_nibbles(32),), (_plane("d", 32), _plane("m", 32))),
    "Q5_0": ((_nibbles(32), _bits), (_plane("d", 32),)),
    "Q5_1": ((_nibbles(32), _bits), (_plane("d", 32), _plane("m", 32))),
    "Q8_0": ((_bytes,), (_plane("d", 32),)),
    "Q2_K": ((_pairs("quants"),), (_plane("scales", 16), _SUPER_MINIMUM)),
    "Q3_K": ((_pairs("quants"), _bits), (_plane("scales", 16), _SUPER)),
    "Q4_K": ((_nibbles(32),), (_beside("scales", "mins", 32), _SUPER_MINIMUM)),
    "Q5_K": ((_nibbles(32), _bits), (_beside("scales", "mins", 32), _SUPER_MINIMUM)),
    "Q6_K": ((_nibbles(16), _pairs("high")), (_plane("scales", 16), _SUPER)),
    "IQ4_NL": ((_nibbles(32),), (_plane("d", 32),)),
    "IQ4_XS": ((_nibbles(32),), (_plane("scales", 32), _SUPER)),
    "MXFP4": ((_nibbles(32),), (_plane("scales", 32),)),
}
