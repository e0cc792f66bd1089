"""How the weights of a one-launch layer lie in memory: tiles of quantised numbers, or rows of 16-bit floats.

layer.cu is compiled behind layer_tiles.cu or layer_rows.cu, which know the one or the other; the classes here say on
the host's side what those need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from multitensor.kernels.cuda.tiles import ROWS, TILE_BYTES, TiledTensor
from multitensor.kernels.quant_tensor import QuantTensor

_COLUMNS_OF_A_ROW_TILE = (256, 128, 64)  # of layer_rows.cu, the first for which shared memory has room
_TYPE_NAMES = ("TYPE", "TYPE_B", "TYPE_C", "TYPE_D")  # of layer_tiles.cu
_COLUMN_UNIT = 8  # 16 bytes, what the copies move at least


class LayerWeights(ABC):
    """One way for weights to lie, the same for all of a launch."""

    sources: tuple[str, ...]
    listed: bool
    """Whether the kernel keeps eight bytes of shared memory a tile."""

    @property
    @abstractmethod
    def warps(self) -> tuple[int, ...]:
        """Of a block; the first for which its multiprocessor has the memory is best."""

    @property
    @abstractmethod
    def stage_bytes(self) -> int:
        """Shared memory of a stage of a warp's ring."""

    @abstractmethod
    def input_bytes(self, super_blocks: int, tokens: int) -> int:
        """Shared memory of the activations, `super_blocks` of 256 columns of each token."""

    @abstractmethod
    def column_tiles(self, w: QuantTensor) -> int:
        """Tiles side by side of a matrix."""

    @abstractmethod
    def address(self, w: QuantTensor) -> torch.Tensor:
        """What begins where the matrix does."""

    @abstractmethod
    def defines(self) -> dict[str, object]:
        """For the compiler."""

    def kinds(self, weights: Sequence[QuantTensor]) -> int:
        """Two bits a matrix: the number of its type."""
        return 0


@dataclass(frozen=True)
class Tiles(LayerWeights):
    """Quantised weights of one to four types, in the order in which they are found."""

    types: tuple[str, ...]
    listed = True
    sources = ("gemv.cu", "layer_tiles.cu", "layer.cu")

    @property
    def warps(self) -> tuple[int, ...]:
        return (16, 12, 8, 6)

    @property
    def stage_bytes(self) -> int:
        return max(TILE_BYTES[name] for name in self.types)

    def input_bytes(self, super_blocks: int, tokens: int) -> int:
        return super_blocks * (32 + 2 * tokens * (256 + 48))

    def column_tiles(self, w: QuantTensor) -> int:
        return _tiled(w).column_blocks

    def address(self, w: QuantTensor) -> torch.Tensor:
        return _tiled(w).tiles

    def defines(self) -> dict[str, object]:
        names = self.types if len(self.types) > 1 else 2 * self.types
        defines: dict[str, object] = dict(zip(_TYPE_NAMES, names, strict=False))
        return defines | ({"TYPES": len(names)} if len(names) > 2 else {})

    def kinds(self, weights: Sequence[QuantTensor]) -> int:
        return sum(self.types.index(w.type.name) << (2 * i) for i, w in enumerate(weights))


@dataclass(frozen=True)
class FloatRows(LayerWeights):
    """Float16 or bfloat16 weights, row-major; `columns` of a tile."""

    dtype: torch.dtype
    columns: int
    listed = False
    sources = ("gemv.cu", "layer_rows.cu", "layer.cu")

    @property
    def warps(self) -> tuple[int, ...]:
        return (8,) if self.columns == max(_COLUMNS_OF_A_ROW_TILE) else (8, 6, 4)

    @property
    def stage_bytes(self) -> int:
        return ROWS * self.columns * 2

    def input_bytes(self, super_blocks: int, tokens: int) -> int:
        return super_blocks * 512 * tokens

    def column_tiles(self, w: QuantTensor) -> int:
        return -(-w.cols // self.columns)

    def address(self, w: QuantTensor) -> torch.Tensor:
        return w.planes["weight"]

    def defines(self) -> dict[str, object]:
        return {"WEIGHT_BFLOAT": str(self.dtype == torch.bfloat16).lower(), "TILE_COLUMNS": self.columns}


def ways_to_lie(weights: Iterable[QuantTensor]) -> tuple[LayerWeights, ...]:
    """How one launch can read all these weights, the best way first; none: not alike, or of too many types."""
    found = list(weights)
    if all(isinstance(w, TiledTensor) for w in found):
        names = tuple(dict.fromkeys(w.type.name for w in found))
        return (Tiles(names),) if 0 < len(names) <= len(_TYPE_NAMES) else ()
    planes = [w.planes.get("weight") for w in found]
    first = planes[0]
    if first is None or first.dtype not in (torch.float16, torch.bfloat16):
        return ()
    if not all(plane is not None and plane.dtype == first.dtype and _copyable(plane) for plane in planes):
        return ()
    return tuple(FloatRows(first.dtype, columns) for columns in _COLUMNS_OF_A_ROW_TILE)


def _copyable(plane: torch.Tensor) -> bool:
    return plane.is_contiguous() and plane.shape[1] % _COLUMN_UNIT == 0 and plane.data_ptr() % 16 == 0


def _tiled(w: QuantTensor) -> TiledTensor:
    if not isinstance(w, TiledTensor):
        raise TypeError(f"{w.type.name} of {w.rows} x {w.cols} does not lie in tiles")
    return w
