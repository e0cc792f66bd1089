"""Attention of sequences with one new token each over the paged cache, their keys split among programs.

Two launches: every program goes over some keys of one sequence for all query heads that read one KV head, keeping a
running maximum (arXiv:2205.14135); then the parts of a query head are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor
from multitensor.kernels.triton.device import INTERPRETED, on

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_PARTS = 64
# Guesses: no GPU has run these kernels.
_PROGRAMS = 512  # that a launch should have
_KEYS = 32  # that a program takes at a time
_KEYS_A_PART = 128  # at least

LOWEST = tl.constexpr(-1e30)  # below every score, and finite: infinities would subtract to NaN


@dataclass(frozen=True)
class Decodes:
    """The sequences of a step that have one query token each, S of them.

    table: int32 [3, S]: the sequence's number, its flat query row, the number of keys in its cache, the new one
    included. rows: int64 [S], the second again. longest: of the third. inputs: the step with no sequence but these;
    others: with all but these, None where there are none.
    """

    table: torch.Tensor
    rows: torch.Tensor
    longest: int
    inputs: AttentionInputs
    others: AttentionInputs | None

    @staticmethod
    def of(step: AttentionInputs) -> Decodes | None:
        """None where no sequence has exactly one query token."""
        chosen = [s for s, length in enumerate(step.query_lens) if length == 1]
        if not chosen:
            return None
        keys = [step.context_lens[s] + 1 for s in chosen]
        host = torch.tensor([chosen, [step.query_starts[s] for s in chosen], keys], dtype=torch.int32)
        table = host.to(step.block_tables.device)
        only = replace(step, query_lens=[int(n == 1) for n in step.query_lens], _decode_chunks={})
        others = None
        if max(step.query_lens) > 1:
            others = replace(step, query_lens=[0 if n == 1 else n for n in step.query_lens])
        return Decodes(table, table[1].long(), max(keys), only, others)


class HeadTable:
    """int32 [KV heads, H]: the query heads that read each KV head, -1 after the last; H at least 16, for the tensor
    cores, and a power of two."""

    def __init__(self, kv_map: Sequence[int], n_kv_heads: int, device: torch.device) -> None:
        members: list[list[int]] = [[] for _ in range(n_kv_heads)]
        for head, kv_head in enumerate(kv_map):
            members[kv_head].append(head)
        self.width = max(16, triton.next_power_of_2(max(map(len, members), default=1)))
        padded = [group + [-1] * (self.width - len(group)) for group in members]
        self.heads = torch.tensor(padded, dtype=torch.int32, device=device)


@triton.jit
def _attend_part(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    decodes: tl.tensor,
    block_tables: tl.tensor,
    head_table: tl.tensor,
    sums: tl.tensor,
    highest: tl.tensor,
    totals: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    query_heads: tl.tensor,
    head_dim: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
) -> None:
    """Program (s, KV head, part) -> of each query head: sums [S, heads, parts, head_dim] of values, the highest score
    and the total of the weights [S, heads, parts], all relative to exp(highest)."""
    s, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequences, kv_heads, parts = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    sequence = tl.load(decodes + s)
    row = tl.load(decodes + sequences + s)
    length = tl.load(decodes + 2 * sequences + s)
    oldest = tl.maximum(length - window, 0) if WINDOWED else 0
    span = tl.cdiv(tl.cdiv(length - oldest, parts), L) * L
    start = oldest + part * span
    stop = tl.minimum(start + span, length)
    head = tl.load(head_table + kv_head * H + tl.arange(0, H))
    dim = tl.arange(0, D)
    real = (head >= 0)[:, None] & (dim < head_dim)[None, :]
    at_query = row.to(tl.int64) * q_stride + head[:, None] * head_dim + dim[None, :]
    query = tl.load(q + at_query, mask=real, other=0.0)
    if WIDE:
        query = query.to(tl.float32)
    most = tl.full((H,), LOWEST, dtype=tl.float32)
    total = tl.zeros((H,), dtype=tl.float32)
    mixed = tl.zeros((H, D), dtype=tl.float32)
    for first in range(start, stop, L):
        position = first + tl.arange(0, L)
        there = position < stop
        at_block = block_tables + sequence.to(tl.int64) * table_stride + position // BLOCK_SIZE
        slot = tl.load(at_block, mask=there, other=0).to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        at = ((slot * kv_heads + kv_head) * head_dim)[:, None] + dim[None, :]
        loaded = there[:, None] & (dim < head_dim)[None, :]
        key = tl.load(k_cache + at, mask=loaded, other=0.0)
        value = tl.load(v_cache + at, mask=loaded, other=0.0)
        if WIDE:
            key, value = key.to(tl.float32), value.to(tl.float32)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        else:
            score = tl.dot(query, tl.trans(key)) * scale
        if CAPPED:
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))  # tanh
        score = tl.where(there[None, :], score, LOWEST)
        higher = tl.maximum(most, tl.max(score, axis=1))
        shrink = tl.exp(most - higher)
        weight = tl.where(there[None, :], tl.exp(score - higher[:, None]), 0.0)
        total = total * shrink + tl.sum(weight, axis=1)
        mixed = mixed * shrink[:, None]
        if WIDE:
            mixed = tl.dot(weight, value, mixed, input_precision="ieee")
        else:
            mixed = tl.dot(weight.to(value.dtype), value, mixed)
        most = higher
    place = (s.to(tl.int64) * query_heads + head) * parts + part
    tl.store(sums + place[:, None] * head_dim + dim[None, :], mixed, mask=real)
    tl.store(highest + place, most, mask=head >= 0)
    tl.store(totals + place, total, mask=head >= 0)


@triton.jit
def _add_parts(
    sums: tl.tensor,
    highest: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    head_dim: tl.tensor,
    PARTS: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Program s * heads + head -> out [S, heads, head_dim]. A part without keys has LOWEST and zeros."""
    place = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    dim = tl.arange(0, D)
    most = tl.load(highest + place * parts + part, mask=part < parts, other=LOWEST)
    weight = tl.exp(most - tl.max(most, axis=0))
    total = tl.sum(weight * tl.load(totals + place * parts + part, mask=part < parts, other=0.0), axis=0)
    at = (place * parts + part)[:, None] * head_dim + dim[None, :]
    loaded = (part < parts)[:, None] & (dim < head_dim)[None, :]
    mixed = tl.sum(weight[:, None] * tl.load(sums + at, mask=loaded, other=0.0), axis=0) / total
    tl.store(out + place * head_dim + dim, mixed.to(out.dtype.element_ty), mask=dim < head_dim)


def takes(q: torch.Tensor, k_cache: CacheTensor, v_cache: CacheTensor) -> bool:
    """Whether `attend` can do it: caches of plain numbers, all of one type that it knows."""
    return (
        q.numel() > 0
        and q.dtype in DTYPES
        and 0 < q.shape[-1] <= MAX_HEAD_DIM
        and all(
            isinstance(cache, torch.Tensor) and cache.dtype in DTYPES and cache.is_contiguous()
            for cache in (k_cache, v_cache)
        )
    )


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    decodes: Decodes,
    heads: HeadTable,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """q [T, query heads, D], of which the rows of the S sequences are used -> [S, query heads, D] in q's dtype.

    Caches [blocks, block_size, KV heads, D]; scale, window and softcap as in kernels/attention.py."""
    q = q if q.stride(2) == 1 and q.stride(1) == q.shape[2] else q.contiguous()
    sequences, n_heads, head_dim = decodes.table.shape[1], q.shape[1], q.shape[2]
    n_kv_heads = k_cache.shape[2]
    visible = decodes.longest if window is None else min(window, decodes.longest)
    wanted = triton.cdiv(_PROGRAMS, sequences * n_kv_heads)
    parts = max(1, min(wanted, triton.cdiv(visible, _KEYS_A_PART), MAX_PARTS))
    sums = torch.empty((sequences, n_heads, parts, head_dim), dtype=torch.float32, device=q.device)
    highest, totals = torch.empty((2, sequences, n_heads, parts), dtype=torch.float32, device=q.device).unbind(0)
    out = torch.empty((sequences, n_heads, head_dim), dtype=q.dtype, device=q.device)
    alike = q.dtype == k_cache.dtype == v_cache.dtype
    # The interpreter multiplies bfloat16 as if it were integers.
    wide = not alike or q.dtype is torch.float32 or (INTERPRETED and q.dtype is torch.bfloat16)
    padded = max(16, triton.next_power_of_2(head_dim))
    with on(q.device):
        _attend_part[(sequences, n_kv_heads, parts)](
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            decodes=decodes.table,
            block_tables=decodes.inputs.block_tables,
            head_table=heads.heads,
            sums=sums,
            highest=highest,
            totals=totals,
            scale=float(scale),
            softcap=float(softcap or 1.0),
            window=window or 0,
            q_stride=q.stride(0),
            table_stride=decodes.inputs.block_tables.stride(0),
            query_heads=n_heads,
            head_dim=head_dim,
            BLOCK_SIZE=k_cache.shape[1],
            WINDOWED=window is not None,
            CAPPED=softcap is not None,
            WIDE=wide,
            H=heads.width,
            D=padded,
            L=_KEYS if padded <= 128 else _KEYS // 2,
            num_warps=4 if padded <= 64 else 8,
            enable_fp_fusion=True,
        )
        _add_parts[(sequences * n_heads,)](
            sums=sums,
            highest=highest,
            totals=totals,
            out=out,
            parts=parts,
            head_dim=head_dim,
            PARTS=triton.next_power_of_2(parts),
            D=padded,
            enable_fp_fusion=True,
        )
    return out
