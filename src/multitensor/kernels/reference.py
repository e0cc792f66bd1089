"""Every operation of a decoder in plain torch: the oracle of the fast kernels, and the fallback on every device."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from multitensor.kernels.attention import paged_attention, write_kv
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.quant_tensor import QuantTensor

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "dequantize",
    "embedding",
    "gated_activation",
    "linear",
    "paged_attention",
    "rms_norm",
    "write_kv",
]

# float32 weights dequantised at a time. A CPU wants them to stay in its caches, a GPU wants large launches.
CPU_CHUNK_BYTES = 4 << 20
GPU_CHUNK_BYTES = 64 << 20


def linear(x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, cols] times w transposed, plus bias [rows]: [T, rows] in x's dtype.

    On a CPU products and sums are float32 whatever the weight's type; on other devices a weight that is not in x's
    dtype is rounded to it, a chunk of rows at a time. No columns give the bias, or zeros.
    """
    if w.type.is_float and w.planes["weight"].dtype == x.dtype:
        return F.linear(x, w.planes["weight"], None if bias is None else bias.to(x.dtype))
    on_cpu = x.device.type == "cpu"
    work_dtype = torch.float32 if on_cpu else x.dtype
    inputs = x.to(work_dtype)
    chunk = max(1, (CPU_CHUNK_BYTES if on_cpu else GPU_CHUNK_BYTES) // max(1, 4 * w.cols))
    if chunk >= w.rows:
        out = F.linear(inputs, dequantize(w).to(work_dtype))
    else:
        out = torch.empty((*x.shape[:-1], w.rows), dtype=work_dtype, device=x.device)
        for start in range(0, w.rows, chunk):
            rows = slice(start, min(start + chunk, w.rows))
            out[..., rows] = F.linear(inputs, dequantize(w, rows).to(work_dtype))
    if bias is not None:
        out += bias.to(work_dtype)
    return out.to(x.dtype)


def embedding(ids: torch.Tensor, w: QuantTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows `ids` (integers [T]) of w: [T, cols] in `dtype`. An id outside [0, w.rows) gives zeros, being another
    rank's: a rank that holds the rows from `start` passes ids - start, and the ranks' results add up to the embedding.
    """
    if w.rows == 0:
        return torch.zeros((ids.shape[0], w.cols), dtype=dtype, device=w.device)
    ids = ids.to(torch.int64)
    mine = (ids >= 0) & (ids < w.rows)
    rows = dequantize(w, torch.where(mine, ids, 0)).to(dtype)
    return torch.where(mine.unsqueeze(-1), rows, 0.0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last axis: in float32, then rounded to x's dtype.
    (arXiv:1910.07467)"""
    factor = weight.to(torch.float32)
    if offset != 0.0:
        factor = factor + offset
    return F.rms_norm(x.to(torch.float32), (x.shape[-1],), factor, eps).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    post_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual += x, in place, or its own rms_norm with post_weight; returns (rms_norm(residual), residual), the first
    in x's dtype."""
    residual += x if post_weight is None else rms_norm(x, post_weight, eps, offset)
    return rms_norm(residual, weight, eps, offset).to(x.dtype), residual


def apply_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: Literal["interleaved", "half"]
) -> torch.Tensor:
    """Rotates the first R numbers of every head: x [T, H, D], cos and sin float32 [T, R/2]; the rest passes through.
    "interleaved" rotates the pairs (2i, 2i+1), "half" the pairs (i, i + R/2). In float32, result in x's dtype.
    (arXiv:2104.09864)"""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotated = x[..., : 2 * half].to(torch.float32)
    if style == "half":
        first, second = rotated[..., :half], rotated[..., half:]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    turned = turned.to(x.dtype)
    if 2 * half == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: Literal["silu", "gelu_tanh"]) -> torch.Tensor:
    """activation(gate) * up, in float32, rounded once to gate's dtype. (arXiv:2002.05202)"""
    wide = gate.to(torch.float32)
    active = F.silu(wide) if kind == "silu" else F.gelu(wide, approximate="tanh")
    return (active * up).to(gate.dtype)
