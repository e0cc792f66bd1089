"""Packing of 1, 2 and 4 bit numbers into the bytes of a plane, and back (torch ops, any device).

Every function works along the last axis and keeps the others. Layouts (declared by formats/quant_types.py):
nibbles of a group of g weights: g/2 bytes, byte i holds weight i in its low and weight i + g/2 in its high half;
pairs: byte k holds weights 4k .. 4k+3, two bits each from the lowest; bits: byte k holds weights 8k .. 8k+7.
"""

from __future__ import annotations

import torch


def pack_nibbles(values: torch.Tensor, group: int) -> torch.Tensor:
    """uint8 [..., n] of 0..15 -> uint8 [..., n/2]."""
    low, high = values.unflatten(-1, (values.shape[-1] // group, 2, group // 2)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def unpack_nibbles(packed: torch.Tensor, group: int) -> torch.Tensor:
    """uint8 [..., n/2] -> uint8 [..., n] of 0..15."""
    grouped = packed.unflatten(-1, (packed.shape[-1] * 2 // group, group // 2))
    return torch.stack((grouped & 15, grouped >> 4), dim=-2).flatten(-3)


def pack_fields(values: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., n] of `width` bits each (1 or 2) -> uint8 [..., n * width / 8], earlier weights in lower bits."""
    per_byte = 8 // width
    grouped = values.unflatten(-1, (values.shape[-1] // per_byte, per_byte))
    packed = grouped[..., 0].clone()
    for place in range(1, per_byte):
        packed |= grouped[..., place] << (place * width)
    return packed


def unpack_fields(packed: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., m] -> uint8 [..., m * 8 / width], the reverse of pack_fields."""
    mask = (1 << width) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, width)], dim=-1).flatten(-2)


def unpack_strided(packed: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., m] -> uint8 [..., m * 8 / width] where the lowest `width` bits of all bytes come first, then the
    next ones: how ggml's K-quants lay the bits of a super-block."""
    mask = (1 << width) - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, width)], dim=-1)
