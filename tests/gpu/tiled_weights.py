"""Random weights in tiles on the GPU with the numbers they stand for, and how far a product is off."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from random_weights import error, tiled

from multitensor.kernels.cuda.tiles import TiledTensor

__all__ = ["error", "weight"]


def weight(
    name: str, rows: int, cols: int, start: int, stop: int, seed: int = 7, scale: float = 0.01
) -> tuple[TiledTensor, torch.Tensor]:
    """As random_weights.tiled."""
    return tiled(name, rows, cols, start, stop, seed, scale, "cuda")
