"""Random weights in tiles with the numbers they stand for, and how far a product is from what it should be."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import random_weights as rw

from multitensor.kernels.cuda.tiles import TiledTensor, to_tiles
from multitensor.kernels.dequantize import dequantize


def weight(
    name: str, rows: int, cols: int, start: int, stop: int, seed: int = 7, scale: float = 0.01
) -> tuple[TiledTensor, torch.Tensor]:
    """Columns [start, stop) of rows x cols random weights on the GPU, tiled, and as float32 numbers."""
    kind = rw.QUANT_TYPES[name]
    planes = rw.slice_of(kind, rw.random_raw(kind, rows, cols, seed, scale), start, stop, "cuda")
    return to_tiles(planes), dequantize(planes)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, over all elements; wanted: float64."""
    return float((found.double() - wanted).norm() / wanted.norm())
