"""File blocks -> the planes of any columns of them, without changing a bit of a weight (torch ops, any device).

A block of the file mixes the bits of its sub-blocks; a plane keeps each sub-block's bits together, so that a slice may
begin and end at any cut unit. Block layouts: ggml's structs (ggml-common.h). Plane layouts: formats/quant_types.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from multitensor.errors import InputError
from multitensor.formats.quant_types import QuantType
from multitensor.kernels.packing import regroup_bits, regroup_nibbles, regroup_pairs, unpack_strided

Planes = dict[str, torch.Tensor]

# Every function below: blocks uint8 [rows, blocks, block bytes] -> planes [rows, blocks, items of a block]; planes may
# be views of the blocks.


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The float16 at a byte offset of every block: [rows, blocks, 1]."""
    return blocks[..., offset : offset + 2].clone(memory_format=torch.contiguous_format).view(torch.float16)


def _q4_0(blocks: torch.Tensor) -> Planes:
    return {"quants": blocks[..., 2:], "d": _half(blocks, 0)}


def _q4_1(blocks: torch.Tensor) -> Planes:
    return {"quants": blocks[..., 4:], "d": _half(blocks, 0), "m": _half(blocks, 2)}


def _q5_0(blocks: torch.Tensor) -> Planes:
    return {"quants": blocks[..., 6:], "high": blocks[..., 2:6], "d": _half(blocks, 0)}


def _q5_1(blocks: torch.Tensor) -> Planes:
    return {"quants": blocks[..., 8:], "high": blocks[..., 4:8], "d": _half(blocks, 0), "m": _half(blocks, 2)}


def _q8_0(blocks: torch.Tensor) -> Planes:
    return {"quants": blocks[..., 2:].view(torch.int8), "d": _half(blocks, 0)}


def _mxfp4(blocks: torch.Tensor) -> Planes:
    return {"quants": blocks[..., 1:], "scales": blocks[..., :1]}


def _q2_k(blocks: torch.Tensor) -> Planes:
    return {
        "quants": regroup_pairs(blocks[..., 16:80]),
        "scales": blocks[..., :16],
        "d": _half(blocks, 80),
        "dmin": _half(blocks, 82),
    }


def _q3_k(blocks: torch.Tensor) -> Planes:
    packed = blocks[..., 96:108]  # sixteen 6-bit scales: low nibbles in eight bytes, then high pairs in four
    low = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), dim=-1)
    scales = (low | (unpack_strided(packed[..., 8:], 2) << 4)).view(torch.int8) - 32
    return {
        "quants": regroup_pairs(blocks[..., 32:96]),
        "high": regroup_bits(blocks[..., :32]),
        "scales": scales,
        "d": _half(blocks, 108),
    }


def _six_bit_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 12 bytes of Q4_K and Q5_K -> eight scales, eight minimums, each uint8 of 0..63."""
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=-1)
    mins = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=-1)
    return scales, mins


def _q4_k(blocks: torch.Tensor) -> Planes:
    scales, mins = _six_bit_scales(blocks[..., 4:16])
    return {
        "quants": regroup_nibbles(blocks[..., 16:], 32, 32),
        "scales": scales,
        "mins": mins,
        "d": _half(blocks, 0),
        "dmin": _half(blocks, 2),
    }


def _q5_k(blocks: torch.Tensor) -> Planes:
    scales, mins = _six_bit_scales(blocks[..., 4:16])
    return {
        "quants": regroup_nibbles(blocks[..., 48:], 32, 32),
        "high": regroup_bits(blocks[..., 16:48]),
        "scales": scales,
        "mins": mins,
        "d": _half(blocks, 0),
        "dmin": _half(blocks, 2),
    }


def _q6_k(blocks: torch.Tensor) -> Planes:
    return {
        "quants": regroup_nibbles(blocks[..., :128], 64, 16),
        "high": regroup_pairs(blocks[..., 128:192]),
        "scales": blocks[..., 192:208].view(torch.int8),
        "d": _half(blocks, 208),
    }


def _iq4_xs(blocks: torch.Tensor) -> Planes:
    high = blocks[..., 2:4]
    pairs = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    low = torch.stack((blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4), dim=-1).flatten(-2)
    return {
        "quants": blocks[..., 8:],
        "scales": (low | (pairs << 4)).view(torch.int8) - 32,
        "d": _half(blocks, 0),
    }


_UNPACKERS: dict[str, Callable[[torch.Tensor], Planes]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _q4_0,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}


def slice_phase(type: QuantType, start: int) -> int:
    """QuantTensor.phase of a slice whose first column is `start` of the whole tensor."""
    return start % type.block_weights


def repack(type: QuantType, raw: torch.Tensor, first_block_column: int, start: int, stop: int) -> Planes:
    """Planes of columns [start, stop) from the file blocks that hold them.

    raw: uint8 [rows, bytes of whole blocks]; its first block begins at column first_block_column (a multiple of
    block_weights, <= start). Columns count from the start of the whole tensor's row. Planes are contiguous, on raw's
    device, and never share memory with it. Scratch: about 3 times raw's bytes, so give large tensors by chunks of rows.
    Raises InputError for a type without a kernel, or a cut inside a cut unit of a quantised type.
    """
    rows = raw.shape[0]
    if type.is_float and type.computable:
        dtype = getattr(torch, type.planes[0].dtype)
        size = type.block_bytes
        piece = raw[:, (start - first_block_column) * size : (stop - first_block_column) * size]
        weight = torch.empty((rows, stop - start), dtype=dtype, device=raw.device)
        weight.view(torch.uint8).copy_(piece)
        return {"weight": weight}
    unpack = _UNPACKERS.get(type.name)
    if unpack is None:
        raise InputError(f"tensor type {type.name} has no kernel yet; convert the model to one of {sorted(_UNPACKERS)}")
    if (start % type.cut_unit or stop % type.cut_unit) and stop > start:
        raise InputError(f"cannot cut {type.name} at columns {start}:{stop}; its unit is {type.cut_unit} columns")
    n_blocks = raw.shape[1] // type.block_bytes
    blocks = raw[:, : n_blocks * type.block_bytes].unflatten(1, (n_blocks, type.block_bytes))
    unpacked = unpack(blocks)
    planes: Planes = {}
    for plane in type.planes:
        first = (start - first_block_column) // plane.weights * plane.items
        items = plane.row_items(start, stop)
        chosen = unpacked[plane.name].flatten(1)[:, first : first + items]
        planes[plane.name] = torch.empty((rows, items), dtype=chosen.dtype, device=raw.device).copy_(chosen)
    return planes
