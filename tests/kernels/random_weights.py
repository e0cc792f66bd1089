"""Random file blocks of every computable type, the oracle's view of them, and slices of them as QuantTensors."""

from __future__ import annotations

import gguf
import numpy as np
import torch

from multitensor.formats.quant_types import QUANT_TYPES, QuantType
from multitensor.kernels.cuda.tiles import TiledTensor, to_tiles
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.repack import repack, slice_phase

# Byte offsets of the float16 numbers of a block (ggml-common.h): random bytes there could be infinite or NaN.
HALF_OFFSETS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
QUANTISED = sorted(HALF_OFFSETS)
FLOATS = ["BF16", "F16", "F32"]
COMPUTABLE = QUANTISED + FLOATS


def random_raw(type: QuantType, rows: int, cols: int, seed: int, scale: float | None = None) -> np.ndarray:
    """uint8 [rows, bytes of a row]: random bits everywhere, finite random factors (all of float16's range, or about
    `scale`, so that weights have a sensible size)."""
    rng = np.random.default_rng(seed)
    if type.is_float:
        values = rng.standard_normal((rows, cols)).astype(np.float32) * np.float32(1.0 if scale is None else scale)
        if type.name == "BF16":
            return np.ascontiguousarray(values).view(np.uint16)[:, 1::2].copy().view(np.uint8)
        return values.astype(np.float16 if type.name == "F16" else np.float32).view(np.uint8)
    blocks = rng.integers(0, 256, (rows, cols // type.block_weights, type.block_bytes), dtype=np.uint8)
    for offset in HALF_OFFSETS[type.name]:
        if scale is None:
            bits = rng.integers(0, 1 << 16, blocks.shape[:2], dtype=np.uint16)
            factors = np.where((bits & 0x7C00) == 0x7C00, bits & np.uint16(0x83FF), bits)  # no infinities, no NaN
        else:
            factors = (rng.uniform(-1, 1, blocks.shape[:2]) * scale).astype(np.float16).view(np.uint16)
        blocks[..., offset : offset + 2] = np.ascontiguousarray(factors[..., None]).view(np.uint8)
    if type.name == "MXFP4" and scale is not None:
        blocks[..., 0] = rng.integers(-3, 1, blocks.shape[:2]) + int(np.log2(scale)) + 127
    return blocks.reshape(rows, cols // type.block_weights * type.block_bytes)


def oracle(type: QuantType, raw: np.ndarray) -> np.ndarray:
    """float32 [rows, cols] as the gguf package computes it."""
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type.name])


def slice_of(type: QuantType, raw: np.ndarray, start: int, stop: int, device: str = "cpu") -> QuantTensor:
    """Columns [start, stop), reading only the file blocks that they touch."""
    first, last = type.read_columns(start, stop)
    read = torch.from_numpy(raw[:, type.row_bytes(first) : type.row_bytes(last)].copy()).to(device)
    planes = repack(type, read, first, start, stop)
    return QuantTensor(type, raw.shape[0], stop - start, planes, slice_phase(type, start))


def random_tensor(name: str, rows: int, cols: int, seed: int, scale: float = 0.05) -> tuple[QuantTensor, np.ndarray]:
    """A whole tensor of sensible size and its oracle values."""
    type = QUANT_TYPES[name]
    raw = random_raw(type, rows, cols, seed, scale)
    return slice_of(type, raw, 0, cols), oracle(type, raw)


def tiled(
    name: str, rows: int, cols: int, start: int, stop: int, seed: int, scale: float, device: str = "cpu"
) -> tuple[TiledTensor, torch.Tensor]:
    """Columns [start, stop) of rows x cols random weights in tiles, and the numbers that they stand for, float32."""
    type = QUANT_TYPES[name]
    planes = slice_of(type, random_raw(type, rows, cols, seed, scale), start, stop, device)
    return to_tiles(planes), dequantize(planes)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, over all elements; wanted: float64."""
    return float((found.double() - wanted).norm() / wanted.norm())
