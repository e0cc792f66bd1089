"""From a layer's query, key and value products to rotated queries, and keys and values in the cache: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from multitensor.kernels.cache_tensor import CacheTensor
from multitensor.kernels.projection import Projection
from multitensor.kernels.triton.device import on

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 512


@triton.jit
def _rotated(
    head: tl.tensor,
    norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    dim: tl.tensor,
    head_dim: tl.tensor,
    half: tl.tensor,
    NORMED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> tl.tensor:
    """Numbers `dim` of a head, normalised and rotated, float32. Each is read once more as its partner's partner."""
    turns = dim < 2 * half
    if INTERLEAVED:
        partner, angle, first = dim ^ 1, dim // 2, (dim & 1) == 0
    else:
        first = dim < half
        partner = tl.where(first, dim + half, dim - half)
        angle = tl.where(first, dim, dim - half)
    partner = tl.where(turns, partner, dim)
    inside = dim < head_dim
    own = tl.load(head + dim, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(head + partner, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        # Rounded where plain torch rounds.
        factor = tl.rsqrt(tl.sum(own * own, axis=0) / head_dim + eps)
        dtype = head.dtype.element_ty
        own = (own * factor * tl.load(norm + dim, mask=inside, other=0.0)).to(dtype).to(tl.float32)
        other = (other * factor * tl.load(norm + partner, mask=inside, other=0.0)).to(dtype).to(tl.float32)
    c = tl.load(cos + angle, mask=turns, other=1.0)
    s = tl.load(sin + angle, mask=turns, other=0.0)
    return own * c + tl.where(first, -other, other) * s


@triton.jit
def _place_heads(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    queries: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    query_heads: tl.tensor,
    kv_heads: tl.tensor,
    head_dim: tl.tensor,
    half: tl.tensor,
    eps: tl.tensor,
    NORMED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Program (token, head): query heads first, then key heads, then value heads."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, D)
    inside = dim < head_dim
    cos += token * half
    sin += token * half
    if head < query_heads:
        source = q + token * q_stride + head * head_dim
        number = _rotated(source, q_norm, cos, sin, eps, dim, head_dim, half, NORMED, INTERLEAVED)
        at = (token * query_heads + head) * head_dim + dim
        tl.store(queries + at, number.to(queries.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token)
        head -= query_heads
        if head < kv_heads:
            source = k + token * k_stride + head * head_dim
            number = _rotated(source, k_norm, cos, sin, eps, dim, head_dim, half, NORMED, INTERLEAVED)
            # Rounded to the activations' type first, as plain torch does.
            number = number.to(k.dtype.element_ty).to(tl.float32)
            at = (slot * kv_heads + head) * head_dim + dim
            tl.store(k_cache + at, number.to(k_cache.dtype.element_ty), mask=inside)
        else:
            head -= kv_heads
            number = tl.load(v + token * v_stride + head * head_dim + dim, mask=inside, other=0.0).to(tl.float32)
            at = (slot * kv_heads + head) * head_dim + dim
            tl.store(v_cache + at, number.to(v_cache.dtype.element_ty), mask=inside)


def takes(q: torch.Tensor, p: Projection, cos: torch.Tensor, *caches: CacheTensor) -> bool:
    """Whether `place_heads` can do it."""
    return (
        q.numel() > 0
        and q.dtype in DTYPES
        and p.head_dim <= MAX_HEAD_DIM
        and 0 < 2 * cos.shape[-1] <= p.head_dim
        and (p.q_norm is None) == (p.k_norm is None)
        and all(n is None or (n.dtype is torch.float32 and n.is_contiguous()) for n in (p.q_norm, p.k_norm))
        and all(isinstance(c, torch.Tensor) and c.dtype in DTYPES and c.is_contiguous() for c in caches)
    )


def place_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    p: Projection,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """As Kernels.place_heads: q [T, query heads, D] and k, v [T, KV heads, D], heads next to each other."""
    q, k, v = (x if x.stride()[1:] == (p.head_dim, 1) else x.contiguous() for x in (q, k, v))
    tokens, query_heads, head_dim = q.shape
    queries = torch.empty((tokens, query_heads, head_dim), dtype=q.dtype, device=q.device)
    with on(q.device):
        _place_heads[(tokens, query_heads + 2 * k.shape[1])](
            q=q,
            k=k,
            v=v,
            q_norm=cos if p.q_norm is None else p.q_norm,
            k_norm=cos if p.k_norm is None else p.k_norm,
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            slots=slots,
            queries=queries,
            k_cache=k_cache,
            v_cache=v_cache,
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            v_stride=v.stride(0),
            query_heads=query_heads,
            kv_heads=k.shape[1],
            head_dim=head_dim,
            half=cos.shape[-1],
            eps=float(p.eps),
            NORMED=p.q_norm is not None,
            INTERLEAVED=p.style == "interleaved",
            D=triton.next_power_of_2(head_dim),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return queries
