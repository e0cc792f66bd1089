"""RMS norm, with the residual add before it, and the norm before that where a model has one: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from multitensor.kernels.triton.device import on

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_COLUMNS = 32768  # a row is one program's, in registers


@triton.jit
def _normalised(
    x: tl.tensor,
    weight: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
) -> tl.tensor:
    """x float32, zero beyond `columns`."""
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) + offset
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / columns + eps) * factor


@triton.jit
def _norm(
    x: tl.tensor,
    residual: tl.tensor,
    post_weight: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    ADDS: tl.constexpr,
    HAS_POST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """All [rows, columns], contiguous; a program a row."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    at = tl.program_id(0).to(tl.int64) * columns + column
    number = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_POST:
        # Rounded where plain torch rounds.
        number = _normalised(number, post_weight, column, columns, eps, offset).to(x.dtype.element_ty).to(tl.float32)
    if ADDS:
        number += tl.load(residual + at, mask=inside, other=0.0)
        tl.store(residual + at, number, mask=inside)
    normed = _normalised(number, weight, column, columns, eps, offset)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


def takes(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> bool:
    """Whether the functions below can do it."""
    return (
        x.numel() > 0
        and x.shape[-1] <= MAX_COLUMNS
        and x.dtype in DTYPES
        and x.is_contiguous()
        and weight.is_contiguous()
        and (
            residual is None
            or (residual.dtype is torch.float32 and residual.is_contiguous() and residual.shape == x.shape)
        )
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """As reference.rms_norm."""
    out = torch.empty_like(x)
    _launch(x, None, weight, eps, offset, None, out)
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    post_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.add_rms_norm: residual, float32, is overwritten."""
    out = torch.empty_like(x)
    _launch(x, residual, weight, eps, offset, post_weight, out)
    return out, residual


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    post_weight: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    columns = x.shape[-1]
    block = triton.next_power_of_2(columns)
    with on(x.device):
        _norm[(x.numel() // columns,)](
            x=x,
            residual=x if residual is None else residual,
            post_weight=weight if post_weight is None else post_weight,
            weight=weight,
            out=out,
            columns=columns,
            eps=float(eps),
            offset=float(offset),
            ADDS=residual is not None,
            HAS_POST=post_weight is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
            enable_fp_fusion=True,
        )
