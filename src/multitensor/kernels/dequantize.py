"""Planes -> float32, in exactly ggml's order of operations, so that every value equals ggml's bit for bit.

Formulas: ggml's dequantize_row_* (ggml-quants.c). No fused multiply-add may creep in: products and sums are separate
torch calls on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from multitensor.errors import InputError
from multitensor.kernels.packing import unpack_fields, unpack_nibbles
from multitensor.kernels.quant_tensor import QuantTensor

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class _Reader:
    """Some rows of a QuantTensor, with planes widened to one number a weight or a scale group."""

    def __init__(self, w: QuantTensor, rows: slice | torch.Tensor | None) -> None:
        self.planes = w.planes if rows is None else {name: plane[rows] for name, plane in w.planes.items()}
        self.cols = w.cols
        self.phase = w.phase
        self.rows = next(iter(self.planes.values())).shape[0]

    def weights(self, values: torch.Tensor, group: int) -> torch.Tensor:
        """Integers [rows, cols] -> new float32 [rows, cols / group, group]."""
        return values.to(torch.float32).view(self.rows, self.cols // group, group)

    def nibbles(self, group: int) -> torch.Tensor:
        return unpack_nibbles(self.planes["quants"], group)

    def scale(self, name: str) -> torch.Tensor:
        """A plane of one number a group -> float32 [rows, groups, 1]."""
        return self.planes[name].to(torch.float32).unsqueeze(-1)

    def block_scale(self, name: str, group: int, block: int = 256) -> torch.Tensor:
        """A plane of one number a super-block -> float32 [rows, groups, 1], one a group of `group` weights."""
        spread = self.planes[name].to(torch.float32).repeat_interleave(block // group, dim=1)
        first = self.phase // group
        return spread[:, first : first + self.cols // group].unsqueeze(-1)


def _q4_0(r: _Reader) -> torch.Tensor:
    return r.weights(r.nibbles(32), 32).sub_(8).mul_(r.scale("d"))


def _q4_1(r: _Reader) -> torch.Tensor:
    return r.weights(r.nibbles(32), 32).mul_(r.scale("d")).add_(r.scale("m"))


def _five_bits(r: _Reader) -> torch.Tensor:
    return r.nibbles(32) | (unpack_fields(r.planes["high"], 1) << 4)


def _q5_0(r: _Reader) -> torch.Tensor:
    return r.weights(_five_bits(r), 32).sub_(16).mul_(r.scale("d"))


def _q5_1(r: _Reader) -> torch.Tensor:
    return r.weights(_five_bits(r), 32).mul_(r.scale("d")).add_(r.scale("m"))


def _q8_0(r: _Reader) -> torch.Tensor:
    return r.weights(r.planes["quants"], 32).mul_(r.scale("d"))


def _q2_k(r: _Reader) -> torch.Tensor:
    packed = r.planes["scales"]
    scale = r.block_scale("d", 16) * (packed & 15).to(torch.float32).unsqueeze(-1)
    minimum = r.block_scale("dmin", 16) * (packed >> 4).to(torch.float32).unsqueeze(-1)
    return r.weights(unpack_fields(r.planes["quants"], 2), 16).mul_(scale).sub_(minimum)


def _q3_k(r: _Reader) -> torch.Tensor:
    scale = r.block_scale("d", 16) * r.scale("scales")
    values = unpack_fields(r.planes["quants"], 2) | (unpack_fields(r.planes["high"], 1) << 2)
    return r.weights(values, 16).sub_(4).mul_(scale)


def _scaled_with_minimum(r: _Reader, values: torch.Tensor) -> torch.Tensor:
    scale = r.block_scale("d", 32) * r.scale("scales")
    minimum = r.block_scale("dmin", 32) * r.scale("mins")
    return r.weights(values, 32).mul_(scale).sub_(minimum)


def _q4_k(r: _Reader) -> torch.Tensor:
    return _scaled_with_minimum(r, r.nibbles(32))


def _q5_k(r: _Reader) -> torch.Tensor:
    return _scaled_with_minimum(r, _five_bits(r))


def _q6_k(r: _Reader) -> torch.Tensor:
    scale = r.block_scale("d", 16) * r.scale("scales")
    values = r.nibbles(16) | (unpack_fields(r.planes["high"], 2) << 4)
    return r.weights(values, 16).sub_(32).mul_(scale)


@lru_cache(maxsize=64)
def _table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A constant on a device, copied there once: a copy a call would make a GPU wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _looked_up(r: _Reader, values: tuple[int, ...]) -> torch.Tensor:
    packed = r.planes["quants"]
    table = _table(values, packed.device)
    halves = [
        table.index_select(0, nibbles.to(torch.int32).flatten()).view(r.rows, r.cols // 32, 16)
        for nibbles in (packed & 15, packed >> 4)
    ]
    return torch.cat(halves, dim=-1)


def _iq4_nl(r: _Reader) -> torch.Tensor:
    return _looked_up(r, IQ4_VALUES).mul_(r.scale("d"))


def _iq4_xs(r: _Reader) -> torch.Tensor:
    scale = r.block_scale("d", 32) * r.scale("scales")
    return _looked_up(r, IQ4_VALUES).mul_(scale)


def _mxfp4(r: _Reader) -> torch.Tensor:
    # Half of 2**(e - 127): the table holds doubled values. e of 0 and 1 give subnormal numbers.
    exponent = r.planes["scales"].to(torch.int32)
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return _looked_up(r, E2M1_DOUBLED).mul_(bits.view(torch.float32).unsqueeze(-1))


_FORMULAS: dict[str, Callable[[_Reader], torch.Tensor]] = {
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
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}


def dequantize(w: QuantTensor, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
    """float32 [rows, cols] on w's device: all rows, a slice of them, or the ones an int64 tensor names.

    For float32 weights the result may share memory with w. Raises InputError for a type without a kernel.
    """
    own = w.expanded(rows)
    if own is not None:
        return own
    if w.type.is_float and w.type.computable:
        plane = w.planes["weight"]
        return (plane if rows is None else plane[rows]).to(torch.float32)
    formula = _FORMULAS.get(w.type.name)
    if formula is None:
        raise InputError(
            f"tensor type {w.type.name} has no kernel yet; convert the model to one of {sorted(_FORMULAS)}"
        )
    reader = _Reader(w, rows)
    if reader.rows == 0 or w.cols == 0:
        return torch.zeros((reader.rows, w.cols), dtype=torch.float32, device=w.device)
    return formula(reader).view(reader.rows, w.cols)
