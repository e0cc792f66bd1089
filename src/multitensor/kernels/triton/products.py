"""Products of 1 to 64 tokens with quantised weights, which stay packed until they are in registers, and the expansion
of weights to numbers for more tokens than that. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.triton.device import INTERPRETED, on
from multitensor.kernels.triton.weights import (
    LAYOUTS,
    arguments,
    group_count,
    is_known,
    place,
    read_codes,
    read_high,
    read_scale,
)

MAX_TOKENS = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows of a program's tile, and bytes of `quants` a row of it. Guesses: no GPU has run these kernels.
_VECTOR_TILE = (4, 512)
_BATCH_TILE = (32, 64)
_EXPAND_TILE = (8, 256)


@triton.jit
def _multiply_vector(
    x: tl.tensor,
    y: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    quants: tl.tensor,
    high: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    d: tl.tensor,
    m: tl.tensor,
    table: tl.tensor,
    quants_stride: tl.tensor,
    high_stride: tl.tensor,
    scales_stride: tl.tensor,
    d_stride: tl.tensor,
    groups: tl.tensor,
    phase: tl.tensor,
    UNIT: tl.constexpr,
    FIELDS: tl.constexpr,
    ADJACENT: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRE: tl.constexpr,
    LOOKUP: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
) -> None:
    """One token, x [cols]: y [rows] = w x + bias. A program takes N rows and multiplies without tensor cores."""
    P: tl.constexpr = UNIT // FIELDS
    row = tl.program_id(0) * N + tl.arange(0, N)
    n = row.to(tl.int64)[:, None, None]
    p = tl.arange(0, P)[None, None, :]
    total = tl.zeros((N, G, P), dtype=tl.float32)
    for first in range(0, groups, G):
        g = (first + tl.arange(0, G))[None, :, None]
        inside = (n < rows) & (g < groups)
        codes = tl.load(quants + n * quants_stride + (g * P + p), mask=inside, other=0)
        word = read_high(high, n, g, inside, high_stride, HIGH)
        scale, least = read_scale(scales, mins, d, m, n, g, inside, scales_stride, d_stride, phase, UNIT, SCALE, LEAST)
        for f in tl.static_range(FIELDS):
            i = place(p, f, UNIT, FIELDS, ADJACENT)
            columns = g * UNIT + i
            w = read_codes(codes, word, table, i, f, FIELDS, HIGH, CENTRE, LOOKUP) * scale - least
            total += w * tl.load(x + columns, mask=g < groups, other=0.0).to(tl.float32)
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def _multiply_batch(
    x: tl.tensor,
    y: tl.tensor,
    bias: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    quants: tl.tensor,
    high: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    d: tl.tensor,
    m: tl.tensor,
    table: tl.tensor,
    quants_stride: tl.tensor,
    high_stride: tl.tensor,
    scales_stride: tl.tensor,
    d_stride: tl.tensor,
    groups: tl.tensor,
    phase: tl.tensor,
    UNIT: tl.constexpr,
    FIELDS: tl.constexpr,
    ADJACENT: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRE: tl.constexpr,
    LOOKUP: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
) -> None:
    """x [tokens <= T, cols]: y [tokens, rows] = x w^T + bias. Weights are rounded to x's type and multiplied by tensor
    cores; WIDE: in float32."""
    P: tl.constexpr = UNIT // FIELDS
    row = tl.program_id(0) * N + tl.arange(0, N)
    n = row.to(tl.int64)[:, None, None]
    p = tl.arange(0, P)[None, None, :]
    t = tl.arange(0, T)[:, None]
    total = tl.zeros((T, N), dtype=tl.float32)
    for first in range(0, groups, G):
        g = (first + tl.arange(0, G))[None, :, None]
        inside = (n < rows) & (g < groups)
        codes = tl.load(quants + n * quants_stride + (g * P + p), mask=inside, other=0)
        word = read_high(high, n, g, inside, high_stride, HIGH)
        scale, least = read_scale(scales, mins, d, m, n, g, inside, scales_stride, d_stride, phase, UNIT, SCALE, LEAST)
        for f in tl.static_range(FIELDS):
            i = place(p, f, UNIT, FIELDS, ADJACENT)
            columns = g * UNIT + i
            w = read_codes(codes, word, table, i, f, FIELDS, HIGH, CENTRE, LOOKUP) * scale - least
            at = tl.reshape(columns, (1, G * P))
            there = (t < tokens) & (at < groups * UNIT)
            part = tl.load(x + t * x_stride + at, mask=there, other=0.0)
            weight = tl.trans(tl.reshape(w, (N, G * P)).to(part.dtype))
            if WIDE:
                total = tl.dot(part.to(tl.float32), weight.to(tl.float32), total, input_precision="ieee")
            else:
                total = tl.dot(part, weight, total)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    out = y + t.to(tl.int64) * rows + row[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(t < tokens) & (row < rows)[None, :])


@triton.jit
def _expand(
    y: tl.tensor,
    rows: tl.tensor,
    quants: tl.tensor,
    high: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    d: tl.tensor,
    m: tl.tensor,
    table: tl.tensor,
    quants_stride: tl.tensor,
    high_stride: tl.tensor,
    scales_stride: tl.tensor,
    d_stride: tl.tensor,
    groups: tl.tensor,
    phase: tl.tensor,
    UNIT: tl.constexpr,
    FIELDS: tl.constexpr,
    ADJACENT: tl.constexpr,
    HIGH: tl.constexpr,
    CENTRE: tl.constexpr,
    LOOKUP: tl.constexpr,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
) -> None:
    """y [rows, cols], contiguous: the numbers."""
    P: tl.constexpr = UNIT // FIELDS
    n = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)[:, None, None]
    g = (tl.program_id(1) * G + tl.arange(0, G))[None, :, None]
    p = tl.arange(0, P)[None, None, :]
    inside = (n < rows) & (g < groups)
    codes = tl.load(quants + n * quants_stride + (g * P + p), mask=inside, other=0)
    word = read_high(high, n, g, inside, high_stride, HIGH)
    scale, least = read_scale(scales, mins, d, m, n, g, inside, scales_stride, d_stride, phase, UNIT, SCALE, LEAST)
    for f in tl.static_range(FIELDS):
        i = place(p, f, UNIT, FIELDS, ADJACENT)
        w = read_codes(codes, word, table, i, f, FIELDS, HIGH, CENTRE, LOOKUP) * scale - least
        tl.store(y + n * (groups * UNIT) + g * UNIT + i, w.to(y.dtype.element_ty), mask=inside)


def takes(x: torch.Tensor, w: QuantTensor) -> bool:
    """Whether `multiply` (up to MAX_TOKENS tokens) and `expand` can serve x [T, w.cols]."""
    return is_known(w) and x.dim() == 2 and x.shape[0] > 0 and x.dtype in DTYPES


def multiply(x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T <= MAX_TOKENS, w.cols] -> [T, w.rows] in x's dtype, plus bias [w.rows]."""
    tokens = x.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((tokens, w.rows), dtype=x.dtype, device=x.device)
    common = {"x": x, "y": y, "rows": w.rows, "bias": y if bias is None else bias.contiguous(), **arguments(w)}
    common |= {"HAS_BIAS": bias is not None, "enable_fp_fusion": True}
    with on(x.device):
        if tokens == 1:
            n, g = _tile(w, _VECTOR_TILE)
            _multiply_vector[(triton.cdiv(w.rows, n),)](N=n, G=g, **common)
            return y
        n, g = _tile(w, _BATCH_TILE)
        # The interpreter multiplies bfloat16 as if it were integers.
        wide = x.dtype is torch.float32 or (INTERPRETED and x.dtype is torch.bfloat16)
        padded = max(16, triton.next_power_of_2(tokens))  # tensor cores want no fewer
        grid = (triton.cdiv(w.rows, n),)
        _multiply_batch[grid](num_warps=8, tokens=tokens, x_stride=x.stride(0), WIDE=wide, T=padded, N=n, G=g, **common)
    return y


def expand(w: QuantTensor, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
    """[rows, w.cols] in float32, float16 or bfloat16: in float32 bit for bit what kernels/dequantize.py gives."""
    start, stop, _ = rows.indices(w.rows)
    y = torch.empty((max(stop - start, 0), w.cols), dtype=dtype, device=w.device)
    if not y.numel():
        return y
    n, g = _tile(w, _EXPAND_TILE)
    part = arguments(w, slice(start, stop))
    with on(w.device):
        # A product and a sum contracted into one operation would round once where ggml rounds twice.
        grid = (triton.cdiv(len(y), n), triton.cdiv(group_count(w), g))
        _expand[grid](y=y, rows=len(y), N=n, G=g, enable_fp_fusion=False, **part)
    return y


def _tile(w: QuantTensor, size: tuple[int, int]) -> tuple[int, int]:
    """Rows, and groups, of a tile with that many rows and bytes a row."""
    layout = LAYOUTS[w.type.name]
    return size[0], size[1] // (layout.unit // layout.fields)
