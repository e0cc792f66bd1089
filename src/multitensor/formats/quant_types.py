"""Tensor types: the block on disk, the cut unit, and the planes that a slice keeps resident (never imports torch).

Three sizes of a slice come from here and from nowhere else: owned (cut units), read (whole file blocks touched) and
resident (the planes below). Sources: the GGUF specification, ggml's block structs (ggml-common.h) for the bytes of a
block, and the safetensors format's list of element types.

Layouts of the planes, per group of weights:
    nibbles32  uint8, 16 bytes per 32 weights: byte i holds weight i in its low nibble, weight i + 16 in its high one
    nibbles16  uint8, 8 bytes per 16 weights: byte i holds weight i low, weight i + 8 high
    bits32     uint8, 4 bytes per 32 weights: bit j of the little-endian 32-bit word belongs to weight j
    bits16     uint8, 2 bytes per 16 weights: bit j of the little-endian 16-bit word belongs to weight j
    pairs16    uint8, 4 bytes per 16 weights: bits 2j and 2j + 1 of the little-endian 32-bit word belong to weight j
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from multitensor.errors import InputError

_DTYPE_BYTES = MappingProxyType(
    {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "float32": 4, "int32": 4}
    | {"uint32": 4, "int64": 8, "uint64": 8, "float64": 8, "bool": 1}
)


@dataclass(frozen=True)
class Plane:
    """One array that a resident slice holds, `items` elements of `dtype` for every `weights` weights of a row.

    A plane whose `weights` exceeds the type's cut unit (a super-block's d and dmin) is copied to each side of a cut.
    """

    name: str
    dtype: str  # numpy name: uint8, int8, float16, float32, bfloat16
    weights: int
    items: int

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _DTYPE_BYTES[self.dtype]

    def row_items(self, start: int, stop: int) -> int:
        """Elements that columns [start, stop) of one row need."""
        return (-(-stop // self.weights) - start // self.weights) * self.items if stop > start else 0


@dataclass(frozen=True)
class QuantType:
    """A type of tensor data. `ggml_id` is -1 for types that only safetensors has.

    block_weights weights take block_bytes bytes on disk; a cut through a row may fall on any multiple of cut_unit.
    """

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
        if stop <= start:
            return start, start
        block = self.block_weights
        return start // block * block, -(-stop // block) * block

    def read_bytes(self, rows: int, start: int, stop: int) -> int:
        """Bytes of the file blocks that `rows` rows x columns [start, stop) touch."""
        first, last = self.read_columns(start, stop)
        return rows * self.row_bytes(last - first)

    def resident_bytes(self, rows: int, start: int, stop: int) -> int:
        """Bytes of all planes of `rows` rows x columns [start, stop). The plan sums it, the loader allocates it."""
        return rows * sum(plane.row_items(start, stop) * plane.itemsize for plane in self.planes)


def _nibbles32() -> Plane:
    return Plane("quants", "uint8", 32, 16)


def _bits32() -> Plane:
    return Plane("high", "uint8", 32, 4)


def _half(name: str, weights: int) -> Plane:
    return Plane(name, "float16", weights, 1)


def _super_d(*names: str) -> tuple[Plane, ...]:
    """float16 factors of a 256-weight super-block."""
    return tuple(_half(name, 256) for name in names)


def _plain(name: str, ggml_id: int, dtype: str, *, computable: bool = False) -> QuantType:
    """One element a weight, kept as it is; cut at 32 elements so that slices stay aligned."""
    planes = (Plane("weight", dtype, 1, 1),)
    return QuantType(
        name, ggml_id, 1, _DTYPE_BYTES[dtype], 32, planes, is_float="float" in dtype, computable=computable
    )


def _raw(name: str, ggml_id: int, weights: int, size: int, unit: int) -> QuantType:
    """Geometry only: no kernel knows the inside of the block, so a slice holds whole blocks."""
    return QuantType(
        name, ggml_id, weights, size, unit, (Plane("raw", "uint8", weights, size),), is_float=False, computable=False
    )


def _ggml_types() -> tuple[QuantType, ...]:
    scales32 = Plane("scales", "uint8", 32, 1)
    signed32 = Plane("scales", "int8", 32, 1)
    signed16 = Plane("scales", "int8", 16, 1)
    k4 = (_nibbles32(), scales32, Plane("mins", "uint8", 32, 1))
    pairs16 = Plane("quants", "uint8", 16, 4)
    q3 = (pairs16, Plane("high", "uint8", 16, 2), signed16)
    q6 = (Plane("quants", "uint8", 16, 8), Plane("high", "uint8", 16, 4), signed16)
    d, m = _half("d", 32), _half("m", 32)
    return (
        _plain("F32", 0, "float32", computable=True),
        _plain("F16", 1, "float16", computable=True),
        _plain("BF16", 30, "bfloat16", computable=True),
        QuantType("Q4_0", 2, 32, 18, 32, (_nibbles32(), d)),
        QuantType("Q4_1", 3, 32, 20, 32, (_nibbles32(), d, m)),
        QuantType("Q5_0", 6, 32, 22, 32, (_nibbles32(), _bits32(), d)),
        QuantType("Q5_1", 7, 32, 24, 32, (_nibbles32(), _bits32(), d, m)),
        QuantType("Q8_0", 8, 32, 34, 32, (Plane("quants", "int8", 32, 32), d)),
        QuantType("Q2_K", 10, 256, 84, 16, (pairs16, Plane("scales", "uint8", 16, 1), *_super_d("d", "dmin"))),
        QuantType("Q3_K", 11, 256, 110, 16, (*q3, *_super_d("d"))),
        QuantType("Q4_K", 12, 256, 144, 32, (*k4, *_super_d("d", "dmin"))),
        QuantType("Q5_K", 13, 256, 176, 32, (*k4, _bits32(), *_super_d("d", "dmin"))),
        QuantType("Q6_K", 14, 256, 210, 16, (*q6, *_super_d("d"))),
        QuantType("IQ4_NL", 20, 32, 18, 32, (_nibbles32(), d)),
        QuantType("IQ4_XS", 23, 256, 136, 32, (_nibbles32(), signed32, *_super_d("d"))),
        QuantType("MXFP4", 39, 32, 17, 32, (_nibbles32(), scales32)),
        _raw("IQ2_XXS", 16, 256, 66, 32),
        _raw("IQ2_XS", 17, 256, 74, 16),
        _raw("IQ3_XXS", 18, 256, 98, 32),
        _raw("IQ1_S", 19, 256, 50, 32),
        _raw("IQ3_S", 21, 256, 110, 32),
        _raw("IQ2_S", 22, 256, 82, 16),
        _raw("IQ1_M", 29, 256, 56, 16),
        _raw("TQ1_0", 34, 256, 54, 32),
        _raw("TQ2_0", 35, 256, 66, 32),
        _raw("NVFP4", 40, 64, 36, 16),
        _raw("Q1_0", 41, 128, 18, 32),
        _plain("I8", 24, "int8"),
        _plain("I16", 25, "int16"),
        _plain("I32", 26, "int32"),
        _plain("I64", 27, "int64"),
        _plain("F64", 28, "float64"),
    )


def _safetensors_types() -> tuple[QuantType, ...]:
    """Element types that GGUF does not have; their names are safetensors' own."""
    return (
        _plain("BOOL", -1, "bool"),
        _plain("U8", -1, "uint8"),
        _plain("U16", -1, "uint16"),
        _plain("U32", -1, "uint32"),
        _plain("U64", -1, "uint64"),
        _raw("F8_E4M3", -1, 1, 1, 32),
        _raw("F8_E5M2", -1, 1, 1, 32),
        _raw("F8_E8M0", -1, 1, 1, 32),
        _raw("F6_E2M3", -1, 4, 3, 32),
        _raw("F6_E3M2", -1, 4, 3, 32),
        _raw("F4", -1, 2, 1, 32),
        _raw("C64", -1, 1, 8, 32),
    )


QUANT_TYPES: Mapping[str, QuantType] = MappingProxyType({t.name: t for t in (*_ggml_types(), *_safetensors_types())})
QUANT_TYPES_BY_ID: Mapping[int, QuantType] = MappingProxyType(
    {t.ggml_id: t for t in QUANT_TYPES.values() if t.ggml_id >= 0}
)


def quant_type(name: str) -> QuantType:
    """The type called `name` ("Q4_K", "F16"; any case). Raises InputError naming the known types."""
    found = QUANT_TYPES.get(name.upper())
    if found is None:
        raise InputError(f"unknown tensor type {name!r}; known: {', '.join(QUANT_TYPES)}")
    return found
