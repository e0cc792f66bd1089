"""Attention of a step's sequences with one query token each where the step is no recorded one: beside prompts, or when
there are more than a recorded step takes. One launch a layer for each 64 of them, on the cache as it lies, where torch
wants the keys gathered and padded to the longest, and a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multitensor.config import KV_GROUP
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor, QuantCache
from multitensor.kernels.cuda.decode import (
    HEAD_DIMS,
    KEY_TILE,
    KINDS,
    MAX_SEQUENCES,
    DecodeAttention,
    DecodeKernels,
    cache_kind,
)


class SingleTokens:
    """On one device and stream. Scratch is kept for each kind of layer: same heads, types, window and scale."""

    def __init__(self, kernels: DecodeKernels) -> None:
        self.kernels = kernels
        self._attention: dict[tuple[object, ...], DecodeAttention] = {}

    @staticmethod
    def takes(q: torch.Tensor, k_cache: CacheTensor, v_cache: CacheTensor) -> bool:
        """Whether `attend` can do it for q [T, query heads, D] and caches [blocks, block_size, KV heads, D]."""
        _, block_size, kv_heads, size = k_cache.shape
        kind = cache_kind(k_cache)
        return (
            q.dtype in (torch.float16, torch.bfloat16)
            and q.numel() > 0
            and kv_heads > 0
            and size in HEAD_DIMS
            and block_size % KEY_TILE == 0
            and kind in KINDS
            and kind == cache_kind(v_cache)
            and (not isinstance(k_cache, QuantCache) or size % KV_GROUP == 0)
        )

    def attend(
        self,
        q: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        inputs: AttentionInputs,
        kv_map: Sequence[int],
        out: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        """Fills the rows of out [T, query heads, D], contiguous, of q's type, that belong to sequences with one query
        token, whose keys are in the cache already; leaves the others."""
        if not out.is_contiguous():
            raise ValueError("attention of single tokens: out is not contiguous")
        rows = q if _is_aligned(q) else q.contiguous()
        attention = self._of(q.dtype, k_cache, tuple(kv_map), (scale, window, softcap))
        for group in inputs.single_tokens(MAX_SEQUENCES):
            # The kernel before may be any of torch's, which lets none start early.
            attention.attend(rows, k_cache, v_cache, group.positions, group.tables, out, rows=group.rows, overlap=False)

    def _of(
        self,
        dtype: torch.dtype,
        cache: CacheTensor,
        kv_map: tuple[int, ...],
        rules: tuple[float, int | None, float | None],
    ) -> DecodeAttention:
        _, block_size, kv_heads, size = cache.shape
        shape = kv_heads, size, dtype, cache_kind(cache), block_size
        key = (kv_map, *shape, *rules)
        found = self._attention.get(key)
        if found is None:
            scale, window, softcap = rules
            found = self._attention[key] = DecodeAttention(
                self.kernels, kv_map, *shape, MAX_SEQUENCES, scale=scale, window=window, softcap=softcap
            )
        return found


def _is_aligned(q: torch.Tensor) -> bool:
    """A token's heads one behind the other, as vectors of 16 bytes."""
    return (
        q.stride(2) == 1 and q.stride(1) == q.shape[2] and q.stride(0) * q.itemsize % 16 == 0 and q.data_ptr() % 16 == 0
    )
