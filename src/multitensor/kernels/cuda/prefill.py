"""The small kernels of an eager step, any number of tokens: one launch instead of several passes of plain torch."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch

from multitensor.config import KV_GROUP
from multitensor.kernels.cache_tensor import CacheTensor, QuantCache
from multitensor.kernels.cuda.decode import KINDS, SLOT_TYPES, addresses, cache_kind, or_null
from multitensor.kernels.cuda.program import Program, launch
from multitensor.kernels.projection import Projection

_HALVES = (torch.float16, torch.bfloat16)
_MAX_ROWS = 65535  # of a grid
_THREADS = 256
_EIGHT = 8  # numbers that a thread takes


class PrefillKernels:
    """On one device; each variant is compiled when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._gate_kernels: dict[torch.dtype, Any] = {}
        self._rope_kernels: dict[tuple[object, ...], Any] = {}
        self._rows = torch.empty(0, dtype=torch.int32, device=device)

    @cached_property
    def overlap(self) -> bool:
        """Programmatic dependent launch exists from compute capability 9.0 on."""
        return torch.cuda.get_device_capability(self.device) >= (9, 0)

    def gate_takes(self, gate: torch.Tensor, up: torch.Tensor) -> bool:
        """Whether `gated_activation` can do it."""
        return (
            gate.dtype in _HALVES
            and gate.dtype == up.dtype
            and gate.shape == up.shape
            and gate.numel() > 0
            and _in_eights(gate)
            and _in_eights(up)
        )

    def gated_activation(
        self, gate: torch.Tensor, up: torch.Tensor, kind: Literal["silu", "gelu_tanh"]
    ) -> torch.Tensor:
        """gate, up [T, F], float16 or bfloat16, rows of any stride in eights -> activation(gate) * up, contiguous.
        In float32, rounded once."""
        tokens, columns = gate.shape
        out = torch.empty((tokens, columns), dtype=gate.dtype, device=gate.device)
        kernel = self._gate_kernels.get(gate.dtype)
        if kernel is None:
            program = Program("prefill.cu", {"X_KIND": KINDS[gate.dtype]}, self.device)
            kernel = self._gate_kernels[gate.dtype] = program.kernel("gated_activation")
        eights = columns // _EIGHT
        arguments = (gate, up, out, eights, gate.stride(0), up.stride(0), int(kind == "gelu_tanh"))
        launch(kernel, (tokens, -(-eights // _THREADS)), _THREADS, 0, arguments, overlap=self.overlap)
        return out

    def project_takes(
        self, tokens: int, dtype: torch.dtype, p: Projection, cos: torch.Tensor, keys: CacheTensor, values: CacheTensor
    ) -> bool:
        """Whether `rope_write_kv` can do it for the products of so many tokens' activations."""
        return (
            dtype in _HALVES
            and 0 < tokens <= _MAX_ROWS
            and p.head_dim % 2 == 0
            and 2 * cos.shape[-1] <= p.head_dim
            and (p.q_norm is None) == (p.k_norm is None)
            and (p.q_norm is None or _is_vector(p.q_norm))
            and (p.k_norm is None or _is_vector(p.k_norm))
            and _is_known(keys, p.head_dim)
            and _is_known(values, p.head_dim)
            and keys.shape[2] == values.shape[2] == p.kv_heads
            and cache_kind(keys) == cache_kind(values)
        )

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        p: Projection,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """qkv [T, query, key and value rows side by side], contiguous: normalises and rotates queries and keys, writes
        keys and values into the caches at int64 slots [T]. Returns the queries [T, query heads, head_dim], a view of
        qkv. cos, sin: float32 [T, R / 2], contiguous."""
        tokens, heads = qkv.shape[0], p.query_heads + 2 * p.kv_heads
        if tokens > len(self._rows):
            self._rows = torch.arange(1 << (tokens - 1).bit_length(), dtype=torch.int32, device=self.device)
        kernel = self._rope_kernel(p.head_dim, k_cache.shape[1], qkv.dtype, cache_kind(k_cache), slot_mapping.dtype)
        norms = (or_null(p.q_norm), or_null(p.k_norm), float(p.eps))
        turns = (cos, sin, cos.shape[-1], int(p.style == "interleaved"))
        # Angles come a row a token, so a token's row takes the place of its position.
        places = (self._rows, slot_mapping, *addresses(k_cache, v_cache), p.query_heads, p.kv_heads)
        arguments = (qkv, or_null(None), *norms, *turns, *places)
        launch(kernel, (-(-heads // 4), tokens), 128, 0, arguments, overlap=self.overlap)
        return qkv.view(tokens, heads, p.head_dim)[:, : p.query_heads]

    def _rope_kernel(
        self, head_dim: int, block_size: int, dtype: torch.dtype, kind: torch.dtype | str, slot: torch.dtype
    ) -> Any:
        key = (head_dim, block_size, dtype, kind, slot)
        kernel = self._rope_kernels.get(key)
        if kernel is None:
            defines = {
                "ROPE_ONLY": 1,
                "HEAD_DIM": head_dim,
                "BLOCK_SIZE": block_size,
                "X_KIND": KINDS[dtype],
                "KV_KIND": KINDS[kind],
                "SLOT": SLOT_TYPES[slot],
            }
            kernel = Program("decode.cu", defines, self.device).kernel("rope_write_kv")
            self._rope_kernels[key] = kernel
        return kernel


def _is_vector(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.is_contiguous()


def _is_known(cache: CacheTensor, head_dim: int) -> bool:
    if isinstance(cache, QuantCache):
        return head_dim % KV_GROUP == 0 and cache.codes.is_contiguous() and cache.scales.is_contiguous()
    return cache.dtype in KINDS and cache.is_contiguous()


def _in_eights(x: torch.Tensor) -> bool:
    """[T, F] whose rows are runs of aligned vectors of eight 16-bit numbers."""
    rows = x.dim() == 2 and x.stride(1) == 1 and x.stride(0) % _EIGHT == 0
    return rows and x.shape[1] % _EIGHT == 0 and x.data_ptr() % 16 == 0
