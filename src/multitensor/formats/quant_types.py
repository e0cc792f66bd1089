"""Tensor types: the block on disk, the cut unit, and the planes that a slice keeps resident (never imports torch).

THE INTERFACE BELOW IS FIXED (other parts are written against it); the table of types is to be filled in.
Sources: the GGUF specification and ggml's block structs (ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plane:
    """One array that a resident slice holds, `items` elements of `dtype` for every `weights` weights of a row.

    A plane whose `weights` exceeds the type's cut unit (a super-block's d and dmin) is copied to each side of a cut.
    """

    name: str
    dtype: str  # numpy name: uint8, int8, float16, float32, bfloat16
    weights: int
    items: int

    def row_items(self, start: int, stop: int) -> int:
        """Elements that columns [start, stop) of one row need."""
        return (-(-stop // self.weights) - start // self.weights) * self.items if stop > start else 0


@dataclass(frozen=True)
class QuantType:
    name: str
    ggml_id: int
    block_weights: int
    block_bytes: int
    cut_unit: int
    planes: tuple[Plane, ...]
    is_float: bool = False
    computable: bool = True  # False: geometry known (inspect, plan), no kernel yet

    def row_bytes(self, columns: int) -> int:
        """Bytes on disk of one row of `columns` weights (a multiple of block_weights)."""
        return columns // self.block_weights * self.block_bytes

    def read_columns(self, start: int, stop: int) -> tuple[int, int]:
        """[start, stop) widened to whole file blocks: an edge block is read by both neighbours."""
        raise NotImplementedError

    def read_bytes(self, rows: int, start: int, stop: int) -> int:
        raise NotImplementedError

    def resident_bytes(self, rows: int, start: int, stop: int) -> int:
        """Bytes of all planes of `rows` rows x columns [start, stop). The plan sums it, the loader allocates it."""
        raise NotImplementedError


QUANT_TYPES: dict[str, QuantType] = {}  # by name; QUANT_TYPES_BY_ID by ggml id


def quant_type(name: str) -> QuantType:
    raise NotImplementedError
