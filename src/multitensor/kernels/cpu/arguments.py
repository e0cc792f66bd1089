"""Torch tensors, caches and a step's lists as the native CPU kernels read them: contiguous, of one type, by address."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64
from typing import Any

import torch

from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor, QuantCache
from multitensor.kernels.cpu.binding import AttentionStruct

Kind = torch.dtype | str
CACHE_TYPES: dict[Kind, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, "q8": 100, "q4": 101}


def contiguous_floats(x: torch.Tensor) -> torch.Tensor:
    # Asked first, because even a `to` that changes nothing costs a microsecond, ten times a layer.
    if x.dtype is torch.float32 and x.is_contiguous():
        return x
    return x.to(torch.float32).contiguous()


def indices(x: torch.Tensor) -> torch.Tensor:
    if x.dtype is torch.int64 and x.is_contiguous():
        return x
    return x.to(torch.int64).contiguous()


def vector(values: torch.Tensor | None, size: int, what: str) -> torch.Tensor | None:
    """A bias or norm weight as C reads it. Raises ValueError for another size."""
    if values is None:
        return None
    if values.numel() != size:
        raise ValueError(f"{what} has {values.numel()} elements, not {size}")
    return contiguous_floats(values)


def cache_kind(cache: CacheTensor) -> Kind:
    return cache.kind if isinstance(cache, QuantCache) else cache.dtype


def cache_parts(cache: CacheTensor) -> tuple[torch.Tensor, ...]:
    return (cache.codes, cache.scales) if isinstance(cache, QuantCache) else (cache,)


def cache_addresses(k_cache: CacheTensor, v_cache: CacheTensor) -> tuple[int, int, int | None, int | None]:
    """Of keys, values, and the scales of both."""
    if isinstance(k_cache, QuantCache) and isinstance(v_cache, QuantCache):
        scales = k_cache.scales.data_ptr(), v_cache.scales.data_ptr()
        return k_cache.codes.data_ptr(), v_cache.codes.data_ptr(), *scales
    return cache_parts(k_cache)[0].data_ptr(), cache_parts(v_cache)[0].data_ptr(), None, None


class StepArrays:
    """The lists of one AttentionInputs as C arrays, and a filled struct for each kind of layer."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs
        n = len(inputs.query_lens)
        self.query_lens = (c_int64 * n)(*inputs.query_lens)
        self.context_lens = (c_int64 * n)(*inputs.context_lens)
        self.query_starts = (c_int64 * n)(*inputs.query_starts)
        self.tables = indices(inputs.block_tables)
        self.layers: dict[tuple[Any, ...], tuple[AttentionStruct, Any]] = {}

    def layer(
        self,
        kv_map: tuple[int, ...],
        scale: float,
        window: int | None,
        softcap: float | None,
        cache: CacheTensor,
    ) -> AttentionStruct:
        kind = cache_kind(cache)
        key = (kv_map, scale, window, softcap, kind, cache.shape)
        found = self.layers.get(key)
        if found is None:
            heads = (c_int32 * len(kv_map))(*kv_map)
            structure = AttentionStruct(
                cache_type=CACHE_TYPES[kind],
                block_size=cache.shape[1],
                n_heads=len(kv_map),
                n_kv_heads=cache.shape[2],
                head_dim=cache.shape[3],
                tables=self.tables.data_ptr(),
                table_stride=self.tables.shape[1],
                n_sequences=len(self.inputs.query_lens),
                query_lens=ctypes.addressof(self.query_lens),
                context_lens=ctypes.addressof(self.context_lens),
                query_starts=ctypes.addressof(self.query_starts),
                kv_map=ctypes.addressof(heads),
                window=window or 0,
                scale=scale,
                softcap=softcap or 0.0,
            )
            found = self.layers[key] = (structure, heads)
        return found[0]
