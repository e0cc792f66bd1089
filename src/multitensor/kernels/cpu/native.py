"""The native CPU kernels (native.c and its parts), called through ctypes. `load` gives None where they are not built.

`NativeKernels` has the methods of reference.py on float32 CPU tensors, without their generality: see each method. Where
a method takes `exact`, False rounds activations to 8 bits, 32 at a time (relative error of a product about 4e-3), and
True keeps them in float32. The library is built by `python setup.py build_ext --inplace` or comes with a wheel.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from ctypes import c_void_p
from typing import Literal, NamedTuple

import torch

from multitensor.errors import InputError
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor
from multitensor.kernels.cpu.arguments import (
    CACHE_TYPES,
    StepArrays,
    cache_addresses,
    cache_kind,
    cache_parts,
    contiguous_floats,
    indices,
    vector,
)
from multitensor.kernels.cpu.binding import LEVELS, PLANES, TYPE_IDS, WeightStruct, load_library
from multitensor.kernels.quant_tensor import QuantTensor

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
MAX_WEIGHTS = 16  # of one `linears` call


class _Described(NamedTuple):
    """A QuantTensor as C sees it. `structure` owns the memory at `address`; `tensor` tells when it may go."""

    address: int
    structure: WeightStruct
    tensor: weakref.ref[QuantTensor]


def load(threads: int | None = None, level: str | None = None) -> NativeKernels | None:
    """Kernels with their own `threads` (None: as many as this process may use cores), or None where they are not built.

    level: "scalar", "avx2" or "avx512" to use no better instructions than those (None: the machine's best).
    """
    library = load_library()
    if library is None:
        return None
    return NativeKernels(library, threads or _usable_cores(), level)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NativeKernels:
    """One rank's native kernels: its threads and scratch memory. Use from one thread at a time is fastest; calls from
    several exclude each other. After a fork the child computes on its one thread."""

    def __init__(self, library: ctypes.CDLL, threads: int, level: str | None = None) -> None:
        best: int = library.mt_best_level()
        wanted = best if level is None else LEVELS.index(level)
        if wanted > best:
            raise InputError(f"this machine has no {level} instructions; its best level is {LEVELS[best]}")
        context = library.mt_create(threads, wanted)
        if not context:
            raise MemoryError("the native CPU kernels: no memory for a context")
        self._library = library
        self._context = context
        self._weights: dict[int, _Described] = {}
        self._step: StepArrays | None = None
        self._close = weakref.finalize(self, library.mt_destroy, context)
        self.threads = threads
        self.level = LEVELS[wanted]

    def close(self) -> None:
        """Ends the threads; the kernels cannot be used afterwards. Safe to call twice."""
        self._close()
        self._context = None

    # ---- weights ----

    def supports(self, w: QuantTensor) -> bool:
        """Whether products with w can be computed here."""
        return w.type.name in TYPE_IDS and w.device.type == "cpu"

    def _describe(self, w: QuantTensor) -> int:
        """Address of w's descriptor, made once a QuantTensor. Raises InputError for a type without a native kernel."""
        found = self._weights.get(id(w))
        if found is not None:
            return found.address
        if not self.supports(w):
            raise InputError(f"tensor type {w.type.name} on {w.device} has no native CPU kernel")
        structure = WeightStruct(type=TYPE_IDS[w.type.name], phase=w.phase, rows=w.rows, cols=w.cols)
        for plane in w.type.planes:
            tensor = w.planes[plane.name]
            needed = plane.row_items(w.phase, w.phase + w.cols) if plane.weights > w.type.cut_unit else None
            items = w.cols * plane.items // plane.weights if needed is None else needed
            if tensor.shape[0] < w.rows or tensor.shape[1] < items or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
                raise InputError(
                    f"plane {plane.name} of a {w.type.name} tensor is {tuple(tensor.shape)}, strides {tensor.stride()};"
                    f" {w.rows} rows of {items} neighbouring items are needed"
                )
            structure.planes[PLANES[plane.name]] = tensor.data_ptr()
            structure.strides[PLANES[plane.name]] = tensor.stride(0) * tensor.element_size()
        key, weights = id(w), self._weights
        reference = weakref.ref(w, lambda _: weights.pop(key, None))
        weights[key] = _Described(ctypes.addressof(structure), structure, reference)
        return weights[key].address

    def _check(self, status: int, what: str) -> None:
        if status == 0:
            return
        if status == -1:
            raise MemoryError(f"{what}: no memory for scratch space of the native CPU kernels")
        raise ValueError(f"{what}: a slot, block or head index lies outside the cache")

    @staticmethod
    def _input(x: torch.Tensor, w: QuantTensor) -> tuple[torch.Tensor, int]:
        """x as C reads it, and its number of rows."""
        if x.shape[-1] != w.cols:
            raise ValueError(f"activations have {x.shape[-1]} columns, the weight {w.cols}")
        x = contiguous_floats(x)
        return x, x.shape[0] if x.dim() == 2 else x.shape[:-1].numel()

    # ---- products ----

    def linear(
        self, x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None, *, exact: bool = False
    ) -> torch.Tensor:
        """x [..., w.cols] times w transposed, plus bias [w.rows]: float32 [..., w.rows]."""
        x, tokens = self._input(x, w)
        out = torch.empty((*x.shape[:-1], w.rows), dtype=torch.float32)
        bias = vector(bias, w.rows, "bias")
        status = self._library.mt_linear_one(
            self._context,
            x.data_ptr(),
            tokens,
            w.cols,
            exact,
            self._describe(w),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
        self._check(status, "linear")
        return out

    def linears(
        self,
        x: torch.Tensor,
        weights: Sequence[QuantTensor],
        biases: Sequence[torch.Tensor | None] | None = None,
        *,
        exact: bool = False,
    ) -> list[torch.Tensor]:
        """`linear` of one x with up to 16 weights of the same columns: x is rounded once, and all are one job."""
        n = len(weights)
        if not 0 < n <= MAX_WEIGHTS or any(w.cols != weights[0].cols for w in weights):
            raise ValueError(f"linears takes 1 to {MAX_WEIGHTS} weights of equal columns")
        x, tokens = self._input(x, weights[0])
        outs = [torch.empty((*x.shape[:-1], w.rows), dtype=torch.float32) for w in weights]
        array = c_void_p * n
        kept = None if biases is None else [vector(b, w.rows, "bias") for b, w in zip(biases, weights, strict=True)]
        status = self._library.mt_linear(
            self._context,
            x.data_ptr(),
            tokens,
            weights[0].cols,
            exact,
            n,
            array(*[self._describe(w) for w in weights]),
            None if kept is None else array(*[None if b is None else b.data_ptr() for b in kept]),
            array(*[out.data_ptr() for out in outs]),
        )
        self._check(status, "linears")
        return outs

    def gated_linear(
        self,
        x: torch.Tensor,
        gate: QuantTensor,
        up: QuantTensor,
        kind: Literal["silu", "gelu_tanh"],
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        """activation(linear(x, gate, gate_bias)) * linear(x, up, up_bias): float32 [..., gate.rows]."""
        if (gate.rows, gate.cols) != (up.rows, up.cols):
            raise ValueError(f"gate is {gate.rows} x {gate.cols}, up {up.rows} x {up.cols}; they must be alike")
        x, tokens = self._input(x, gate)
        out = torch.empty((*x.shape[:-1], gate.rows), dtype=torch.float32)
        gate_bias, up_bias = vector(gate_bias, gate.rows, "gate bias"), vector(up_bias, up.rows, "up bias")
        status = self._library.mt_gated_linear(
            self._context,
            x.data_ptr(),
            tokens,
            gate.cols,
            exact,
            self._describe(gate),
            self._describe(up),
            None if gate_bias is None else gate_bias.data_ptr(),
            None if up_bias is None else up_bias.data_ptr(),
            ACTIVATIONS[kind],
            out.data_ptr(),
        )
        self._check(status, "gated_linear")
        return out

    def dequantize(self, w: QuantTensor, rows: slice | None = None) -> torch.Tensor:
        """float32 [rows, cols], bit for bit reference.dequantize's; `rows` is a slice of step 1."""
        start, stop, step = (rows or slice(None)).indices(w.rows)
        if step != 1:
            raise ValueError(f"rows must be a slice of step 1, not {step}")
        out = torch.empty((max(0, stop - start), w.cols), dtype=torch.float32)
        status = self._library.mt_rows(self._context, self._describe(w), None, start, out.shape[0], out.data_ptr())
        self._check(status, "dequantize")
        return out

    def embedding(self, ids: torch.Tensor, w: QuantTensor) -> torch.Tensor:
        """Integer ids [T] -> float32 [T, w.cols]; an id outside [0, w.rows) gives zeros."""
        ids = indices(ids)
        out = torch.empty((ids.numel(), w.cols), dtype=torch.float32)
        status = self._library.mt_rows(self._context, self._describe(w), ids.data_ptr(), 0, ids.numel(), out.data_ptr())
        self._check(status, "embedding")
        return out

    # ---- element-wise ----

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last axis, float32."""
        x = contiguous_floats(x)
        return self._norm(x, None, weight, eps, offset)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """residual += x, in place (residual float32 and contiguous); returns (rms_norm(residual), residual)."""
        if residual.dtype is not torch.float32 or not residual.is_contiguous() or residual.shape != x.shape:
            raise ValueError("add_rms_norm wants a contiguous float32 residual of x's shape")
        return self._norm(contiguous_floats(x), residual, weight, eps, offset), residual

    def _norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
    ) -> torch.Tensor:
        cols = x.shape[-1]
        factors = vector(weight, cols, "norm weight")
        out = torch.empty_like(x)
        self._library.mt_rms_norm(
            self._context,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            x.shape[:-1].numel(),
            cols,
            None if factors is None else factors.data_ptr(),
            eps,
            offset,
            out.data_ptr(),
        )
        return out

    def gated_activation(
        self, gate: torch.Tensor, up: torch.Tensor, kind: Literal["silu", "gelu_tanh"]
    ) -> torch.Tensor:
        """activation(gate) * up, float32, in new memory."""
        if gate.shape != up.shape:
            raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must be alike")
        out = gate.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        up = contiguous_floats(up)
        self._library.mt_gated_activation(self._context, out.data_ptr(), up.data_ptr(), out.numel(), ACTIVATIONS[kind])
        return out

    def apply_rope(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        style: Literal["interleaved", "half"],
        other: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotates the first R numbers of every head of x [T, H, D] in place, and of `other` [T, H', D] with it; cos and
        sin float32 [T, R / 2]. All float32; heads must be neighbours in memory."""
        tokens, heads, head_dim = x.shape
        for tensor in (x,) if other is None else (x, other):
            if tensor.dtype is not torch.float32 or (tensor.numel() and tensor.stride()[1:] != (head_dim, 1)):
                raise ValueError("apply_rope wants float32 with heads next to each other")
        cos, sin = contiguous_floats(cos), contiguous_floats(sin)
        half = cos.shape[-1]
        if cos.shape != sin.shape or cos.numel() != tokens * half or 2 * half > head_dim:
            raise ValueError(f"cos is {tuple(cos.shape)}, sin {tuple(sin.shape)} for heads {tuple(x.shape)}")
        if other is not None and (other.shape[0] != tokens or other.shape[2] != head_dim):
            raise ValueError(f"heads {tuple(x.shape)} and {tuple(other.shape)} differ in tokens or size")
        self._library.mt_rope(
            self._context,
            tokens,
            head_dim,
            x.data_ptr(),
            heads,
            x.stride(0),
            None if other is None else other.data_ptr(),
            0 if other is None else other.shape[1],
            0 if other is None else other.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            half,
            style == "interleaved",
        )
        return x

    # ---- the paged cache ----

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """k, v float32 [T, H, D] into contiguous caches [blocks, block_size, H, D] (float32, float16, bfloat16 or
        quantised) at the flat slots int64 [T]. Raises ValueError for a slot outside the cache."""
        tokens, heads, head_dim = k.shape
        self._check_caches(k_cache, v_cache)
        if k_cache.shape[2:] != (heads, head_dim) or v.shape != k.shape or slot_mapping.numel() != tokens:
            raise ValueError(
                f"keys {tuple(k.shape)}, values {tuple(v.shape)} and {slot_mapping.numel()} slots do not fit a cache "
                f"{tuple(k_cache.shape)}"
            )
        k, v = contiguous_floats(k), contiguous_floats(v)
        slots = indices(slot_mapping)
        width = heads * head_dim
        status = self._library.mt_write_kv(
            self._context,
            k.data_ptr(),
            v.data_ptr(),
            tokens,
            heads,
            head_dim,
            width,
            width,
            *cache_addresses(k_cache, v_cache),
            k_cache.shape[1],
            CACHE_TYPES[cache_kind(k_cache)],
            slots.data_ptr(),
            k_cache.shape[0] * k_cache.shape[1],
        )
        self._check(status, "write_kv")

    @staticmethod
    def _check_caches(k_cache: CacheTensor, v_cache: CacheTensor) -> None:
        kind = cache_kind(k_cache)
        if k_cache.shape != v_cache.shape or kind != cache_kind(v_cache) or kind not in CACHE_TYPES:
            raise ValueError("key and value caches must be alike, of float32, float16, bfloat16, q8 or q4")
        if not all(part.is_contiguous() for cache in (k_cache, v_cache) for part in cache_parts(cache)):
            raise ValueError("key and value caches must be contiguous")

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        inputs: AttentionInputs,
        kv_map: Sequence[int],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """q float32 [T, heads, D] over contiguous caches [blocks, block_size, KV heads, D]: float32 [T, heads, D].
        As reference.paged_attention; raises ValueError for a block or KV head outside the cache."""
        self._check_caches(k_cache, v_cache)
        q = contiguous_floats(q)
        tokens, heads, head_dim = q.shape
        if heads != len(kv_map) or head_dim != k_cache.shape[3] or tokens != sum(inputs.query_lens):
            raise ValueError(
                f"queries {tuple(q.shape)} do not fit {len(kv_map)} heads, {sum(inputs.query_lens)} tokens and a cache "
                f"{tuple(k_cache.shape)}"
            )
        if self._step is None or self._step.inputs is not inputs:
            self._step = StepArrays(inputs)
        out = torch.empty_like(q)
        structure = self._step.layer(tuple(kv_map), scale, window, softcap, k_cache)
        structure.q = q.data_ptr()
        structure.q_stride = heads * head_dim
        structure.out = out.data_ptr()
        structure.keys, structure.values, structure.key_scales, structure.value_scales = cache_addresses(
            k_cache, v_cache
        )
        status = self._library.mt_attention(self._context, ctypes.byref(structure), k_cache.shape[0])
        self._check(status, "paged_attention")
        return out
