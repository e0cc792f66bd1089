"""A packed weight slice on one device: planes and their type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from multitensor.formats.quant_types import QuantType


@dataclass(frozen=True)
class QuantTensor:
    """`rows` x `cols` weights. planes[name]: [rows, items] tensor of the dtype that the type's Plane declares.

    phase: columns between the start of the super-block in which the slice starts and the slice's first column
    (0 unless a cut went through a super-block): group g of a super-block plane covers columns
    [g * weights - phase, (g + 1) * weights - phase) of the slice.
    Float types have one plane "weight" of [rows, cols] in float32, float16 or bfloat16.
    """

    type: QuantType
    rows: int
    cols: int
    planes: Mapping[str, torch.Tensor]
    phase: int = 0

    @property
    def device(self) -> torch.device:
        return next(iter(self.planes.values())).device

    @property
    def nbytes(self) -> int:
        return sum(plane.numel() * plane.element_size() for plane in self.planes.values())

    def expanded(self, rows: slice | torch.Tensor | None) -> torch.Tensor | None:
        """float32 [rows, cols] where a device's own layout has replaced the planes; None: the planes are all there is
        to know, and kernels/dequantize.py reads them."""
        return None
