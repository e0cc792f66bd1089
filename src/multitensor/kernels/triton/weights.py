"""How planes become numbers: one row a type (LAYOUTS), and the few Triton functions that read any of them.

A tile of weights is [N, G, P]: N rows, G groups of UNIT weights (what one scale covers), P bytes of `quants` a group.
A byte holds FIELDS weights; a kernel takes them a field at a time, so that no number has to change its place: number p
of field f is weight `place(p, f)` of its group. The order of operations is kernels/dequantize.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from multitensor.kernels.dequantize import E2M1_DOUBLED, IQ4_VALUES
from multitensor.kernels.quant_tensor import QuantTensor

# What a group's weights are multiplied by ...
OWN_D = tl.constexpr(0)  # d, one a group
SCALES = tl.constexpr(1)  # the super-block's d x scales
NIBBLES = tl.constexpr(2)  # the super-block's d x the low four bits of scales
POWERS = tl.constexpr(3)  # half of 2 ** (scales - 127)
# ... and what is taken away afterwards.
NOTHING = tl.constexpr(0)
OWN_M = tl.constexpr(1)  # -m, one a group
MINS = tl.constexpr(2)  # the super-block's dmin x mins
HIGH_NIBBLES = tl.constexpr(3)  # the super-block's dmin x the high four bits of scales


_WORDS = {16: torch.int16, 32: torch.int32}  # by bits


@dataclass(frozen=True)
class Layout:
    """unit: weights of a group. fields: weights in a byte of `quants`; adjacent: these are neighbours, else they stand
    unit / fields apart. high: bits a weight in the plane `high`, lowest weight first. centre: subtracted from the code.
    lookup: the codes' values, if not the codes themselves. scale, least: as above."""

    unit: int
    fields: int = 2
    adjacent: bool = False
    high: int = 0
    centre: int = 0
    lookup: tuple[int, ...] = ()
    scale: tl.constexpr = OWN_D
    least: tl.constexpr = NOTHING


LAYOUTS = {
    "Q4_0": Layout(32, centre=8),
    "Q4_1": Layout(32, least=OWN_M),
    "Q5_0": Layout(32, high=1, centre=16),
    "Q5_1": Layout(32, high=1, least=OWN_M),
    "Q8_0": Layout(32, fields=1),
    "Q2_K": Layout(16, fields=4, adjacent=True, scale=NIBBLES, least=HIGH_NIBBLES),
    "Q3_K": Layout(16, fields=4, adjacent=True, high=1, centre=4, scale=SCALES),
    "Q4_K": Layout(32, scale=SCALES, least=MINS),
    "Q5_K": Layout(32, high=1, scale=SCALES, least=MINS),
    "Q6_K": Layout(16, high=2, centre=32, scale=SCALES),
    "IQ4_NL": Layout(32, lookup=IQ4_VALUES),
    "IQ4_XS": Layout(32, lookup=IQ4_VALUES, scale=SCALES),
    "MXFP4": Layout(32, lookup=E2M1_DOUBLED, scale=POWERS),
}


@lru_cache(maxsize=64)
def _table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values or (0,), dtype=torch.float32, device=device)


def is_known(w: QuantTensor) -> bool:
    """Whether the functions below read w: its type, and its planes as the loader lays them."""
    return w.type.name in LAYOUTS and w.rows > 0 and w.cols > 0 and all(p.is_contiguous() for p in w.planes.values())


def group_count(w: QuantTensor) -> int:
    """Groups in a row of w."""
    return w.cols // LAYOUTS[w.type.name].unit


def arguments(w: QuantTensor, rows: slice = slice(None)) -> dict[str, object]:
    """What the kernels take of some rows of w. A plane that the type lacks is never read: any address will do."""
    layout = LAYOUTS[w.type.name]
    planes = {name: plane[rows] for name, plane in w.planes.items()}
    quants = planes["quants"]
    absent = quants
    d, scales = planes.get("d", absent), planes.get("scales", absent)
    # One word a group: its bits are the weights' in order, on these (little-endian) machines.
    high = planes["high"].view(_WORDS[layout.unit * layout.high]) if layout.high else absent
    return {
        "quants": quants,
        "high": high,
        "scales": scales,
        "mins": planes.get("mins", absent),
        "d": d,
        "m": planes.get("m", planes.get("dmin", absent)),
        "table": _table(layout.lookup, w.device),
        "quants_stride": quants.stride(0),
        "high_stride": high.stride(0),
        "scales_stride": scales.stride(0),
        "d_stride": d.stride(0),
        "groups": group_count(w),
        "phase": w.phase,
        "UNIT": layout.unit,
        "FIELDS": layout.fields,
        "ADJACENT": layout.adjacent,
        "HIGH": layout.high,
        "CENTRE": layout.centre,
        "LOOKUP": bool(layout.lookup),
        "SCALE": layout.scale.value,
        "LEAST": layout.least.value,
    }


@triton.jit
def place(p: tl.tensor, f: tl.constexpr, UNIT: tl.constexpr, FIELDS: tl.constexpr, ADJACENT: tl.constexpr) -> tl.tensor:
    """Which weight of its group is in field f of byte p."""
    if ADJACENT:
        i = p * FIELDS + f
    else:
        i = p + f * (UNIT // FIELDS)
    return i


@triton.jit
def read_scale(
    scales: tl.tensor,
    mins: tl.tensor,
    d: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    g: tl.tensor,
    inside: tl.tensor,
    scales_stride: tl.tensor,
    d_stride: tl.tensor,
    phase: tl.tensor,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What groups g (int32 [1, G, 1]) of rows n (int64 [N, 1, 1]) are multiplied by, and what is taken away then:
    float32 [N, G, 1] each, zero where not `inside`; the second a plain zero for types that take nothing away."""
    at = n * scales_stride + g
    own = n * d_stride + g
    block = n * d_stride + (g * UNIT + phase) // 256
    least = 0.0
    if SCALE == POWERS:
        exponent = tl.load(scales + at, mask=inside, other=0).to(tl.int32)
        # 0 and 1 give subnormal numbers.
        bits = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (exponent - 1) << 23)
        scale = bits.to(tl.float32, bitcast=True)
    elif SCALE == OWN_D:
        scale = tl.load(d + own, mask=inside, other=0.0).to(tl.float32)
        if LEAST == OWN_M:
            least = -tl.load(m + own, mask=inside, other=0.0).to(tl.float32)
    else:
        factor = tl.load(scales + at, mask=inside, other=0)
        if LEAST != NOTHING:
            minimum = factor >> 4 if LEAST == HIGH_NIBBLES else tl.load(mins + at, mask=inside, other=0)
            least = tl.load(m + block, mask=inside, other=0.0).to(tl.float32) * minimum.to(tl.float32)
        if SCALE == NIBBLES:
            factor = factor & 15
        scale = tl.load(d + block, mask=inside, other=0.0).to(tl.float32) * factor.to(tl.float32)
    return scale, least


@triton.jit
def read_high(
    high: tl.tensor, n: tl.tensor, g: tl.tensor, inside: tl.tensor, high_stride: tl.tensor, HIGH: tl.constexpr
) -> tl.tensor:
    """n, g, inside as in read_scale -> int32 [N, G, 1], the high bits of a group's weights, lowest weight first."""
    if HIGH > 0:
        word = tl.load(high + n * high_stride + g, mask=inside, other=0).to(tl.int32)
    else:
        word = 0
    return word


@triton.jit
def read_codes(
    codes: tl.tensor,
    word: tl.tensor,
    table: tl.tensor,
    i: tl.tensor,
    f: tl.constexpr,
    FIELDS: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRE: tl.constexpr,
    LOOKUP: tl.constexpr,
) -> tl.tensor:
    """codes: bytes of `quants` [N, G, P]; word: as of read_high; i [1, 1, P]: which weights of their group are in field
    f -> unscaled float32 [N, G, P]."""
    code = codes.to(tl.int32)
    if FIELDS > 1:
        code = (code >> (f * (8 // FIELDS))) & ((1 << (8 // FIELDS)) - 1)
    if HIGH > 0:
        code = code | (((word >> (i * HIGH)) & ((1 << HIGH) - 1)) << (8 // FIELDS))
    if LOOKUP:
        number = tl.load(table + code)
    else:
        number = (code - CENTRE).to(tl.float32)
    return number
