"""Packing into tiles, on the CPU. What the tiles mean is tested on GPUs, by the kernels that read them."""

from __future__ import annotations

import pytest
import torch
from random_weights import random_raw, slice_of

from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels.cuda import tiles
from multitensor.kernels.cuda.tiles import TILE_BYTES, to_tiles


@pytest.mark.parametrize("name", sorted(TILE_BYTES))
def test_some_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill no group at the end, columns that begin and end within a super-block."""
    kind = QUANT_TYPES[name]
    planes = slice_of(kind, random_raw(kind, 71, 1024, seed=3), 288, 992)
    at_once = to_tiles(planes)
    assert at_once.tiles.shape == (5, -(-(planes.phase + planes.cols) // 256), TILE_BYTES[name])
    monkeypatch.setattr(tiles, "_PACKED_WEIGHTS", 2 * 16 * 256 * at_once.column_blocks)
    assert torch.equal(to_tiles(planes).tiles, at_once.tiles)
    monkeypatch.setattr(tiles, "_PACKED_WEIGHTS", 1)
    assert torch.equal(to_tiles(planes).tiles, at_once.tiles)
    last = to_tiles(slice_of(kind, random_raw(kind, 71, 1024, seed=3)[64:], 288, 992))
    assert torch.equal(last.tiles, at_once.tiles[4:])
