"""Numbers of 1, 2 and 4 bits: out of planes, and out of ggml's super-blocks into planes (torch ops, any device).

Every function works along the last axis and keeps the others. Layouts of planes: formats/quant_types.py. The functions
for super-blocks treat eight bytes as one little-endian 64-bit word, which is several times faster on a CPU.
"""

from __future__ import annotations

import torch

LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
LOW_PAIRS = 0x0303030303030303
LOW_BITS = 0x0101010101010101


def unpack_nibbles(packed: torch.Tensor, group: int) -> torch.Tensor:
    """uint8 [..., n/2] -> uint8 [..., n] of 0..15: byte i of a group holds weights i and i + group/2."""
    grouped = packed.unflatten(-1, (packed.shape[-1] * 2 // group, group // 2))
    return torch.stack((grouped & 15, grouped >> 4), dim=-2).flatten(-3)


def unpack_fields(packed: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., m] -> uint8 [..., m * 8 / width]: earlier weights are in the lower bits of a byte."""
    mask = (1 << width) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, width)], dim=-1).flatten(-2)


def unpack_strided(packed: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., m] -> uint8 [..., m * 8 / width]: the lowest `width` bits of all bytes come first, then the next."""
    mask = (1 << width) - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, width)], dim=-1)


def _words(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 8 n], of any strides -> int64 [..., n]"""
    copy = torch.empty(packed.shape, dtype=torch.uint8, device=packed.device).copy_(packed)
    return copy.view(torch.int64)


def regroup_nibbles(packed: torch.Tensor, run: int, group: int) -> torch.Tensor:
    """Runs of `run` bytes, whose low halves hold `run` weights and whose high halves the next `run` -> nibbles of
    groups of `group` weights (nibbles16 or nibbles32)."""
    words = _words(packed).unflatten(-1, (packed.shape[-1] // run, run // group, 2, group // 16))
    first, second = words.unbind(-2)
    low = (first & LOW_NIBBLES) | ((second & LOW_NIBBLES) << 4)
    high = ((first >> 4) & LOW_NIBBLES) | (second & ~LOW_NIBBLES)
    return torch.stack((low, high), dim=-3).flatten(-4).view(torch.uint8)


def regroup_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Runs of 32 bytes, whose lowest two bits hold 32 weights, the next two the next 32, and so on -> pairs16."""
    words = _words(packed).unflatten(-1, (packed.shape[-1] // 32, 1, 4))
    shifted = torch.cat([words >> shift for shift in (0, 2, 4, 6)], dim=-2) & LOW_PAIRS
    shifted |= shifted >> 6  # the pairs of bytes 1, 3, 5, 7 come beside those of 0, 2, 4, 6;
    shifted |= shifted >> 12  # then those of 2 and 6 beside 0 and 4: bytes 0 and 4 hold four weights each
    return shifted.flatten(-3).view(torch.uint8)[..., ::4]


def regroup_bits(packed: torch.Tensor) -> torch.Tensor:
    """32 bytes whose bit s belongs to the s-th 32 weights -> one bit a weight in order (bits16 and bits32 alike)."""
    words = _words(packed).unsqueeze(-2)
    shifted = torch.cat([words >> shift for shift in range(8)], dim=-2) & LOW_BITS
    for distance in (7, 14, 28):  # each doubles how many neighbours' bits stand side by side in a word's byte 0
        shifted |= shifted >> distance
    return shifted.flatten(-2).view(torch.uint8)[..., ::8]
