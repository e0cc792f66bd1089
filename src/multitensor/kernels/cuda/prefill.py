"""The small kernels of an eager step, any number of tokens: one launch instead of several passes of plain torch."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

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
        self._programs: dict[tuple[object, ...], Program] = {}
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
            and all(_in_eights(x) for x in (gate, up))
        )

    def gated_activation(
        self, gate: torch.Tensor, up: torch.Tensor, kind: Literal["silu", "gelu_tanh"]
    ) -> torch.Tensor:
        """gate, up [T, F], float16 or bfloat16, rows of any stride in eights -> activation(gate) * up, contiguous.
        In float32, rounded once."""
        tokens, columns = gate.shape
        out = torch.empty((tokens, columns), dtype=gate.dtype, device=gate.device)
        kernel = self._program("prefill.cu", {"X_KIND": KINDS[gate.dtype]}).kernel("gated_activation")
        eights = columns // _EIGHT
        arguments = (gate, up, out, eights, gate.stride(0), up.stride(0), int(kind == "gelu_tanh"))
        launch(kernel, (tokens, -(-eights // _THREADS)), _THREADS, 0, arguments, overlap=self.overlap)
        return out

    def project_takes(
        self, tokens: int, dtype: torch.dtype, p: Projection, cos: torch.Tensor, *caches: CacheTensor
    ) -> bool:
        """Whether `rope_write_kv` can do it for the products of so many tokens' activations."""
        vectors = [v for v in (p.q_norm, p.k_norm) if v is not None]
        return (
            dtype in _HALVES
            and 0 < tokens <= _MAX_ROWS
            and p.head_dim % 2 == 0
            and 2 * cos.shape[-1] <= p.head_dim
            and len(vectors) in (0, 2)
            and all(v.dtype == torch.float32 and v.is_contiguous() for v in vectors)
            and all(_is_known(cache, p.head_dim) and cache.shape[2] == p.kv_heads for cache in caches)
            and cache_kind(caches[0]) == cache_kind(caches[1])
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
        defines = {
            "ROPE_ONLY": 1,
            "HEAD_DIM": p.head_dim,
            "BLOCK_SIZE": k_cache.shape[1],
            "X_KIND": KINDS[qkv.dtype],
            "KV_KIND": KINDS[cache_kind(k_cache)],
            "SLOT": SLOT_TYPES[slot_mapping.dtype],
        }
        kernel = self._program("decode.cu", defines).kernel("rope_write_kv")
        norms = (or_null(p.q_norm), or_null(p.k_norm), float(p.eps))
        turns = (cos, sin, cos.shape[-1], int(p.style == "interleaved"))
        # Angles come a row a token, so a token's row takes the place of its position.
        places = (self._rows, slot_mapping, *addresses(k_cache, v_cache), p.query_heads, p.kv_heads)
        arguments = (qkv, or_null(None), *norms, *turns, *places)
        launch(kernel, (-(-heads // 4), tokens), 128, 0, arguments, overlap=self.overlap)
        return qkv[:, : p.query_heads * p.head_dim].unflatten(1, (p.query_heads, p.head_dim))

    def _program(self, source: str, defines: dict[str, object]) -> Program:
        key = (source, *defines.items())
        if key not in self._programs:
            self._programs[key] = Program(source, defines, self.device)
        return self._programs[key]


def _is_known(cache: CacheTensor, head_dim: int) -> bool:
    if isinstance(cache, QuantCache):
        return head_dim % KV_GROUP == 0 and cache.codes.is_contiguous() and cache.scales.is_contiguous()
    return cache.dtype in KINDS and cache.is_contiguous()


def _in_eights(x: torch.Tensor) -> bool:
    """[T, F] whose rows are runs of aligned vectors of eight 16-bit numbers."""
    rows = x.dim() == 2 and x.stride(1) == 1 and x.stride(0) % _EIGHT == 0
    return rows and x.shape[1] % _EIGHT == 0 and x.data_ptr() % 16 == 0
