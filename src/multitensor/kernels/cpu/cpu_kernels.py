"""`Kernels` on a CPU: the native ones for float32 activations, plain torch for what these do not take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor
from multitensor.kernels.cpu.native import NativeKernels
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.torch_kernels import Kernels


class CpuKernels(Kernels):
    """Native kernels compute in float32; results are rounded to x's dtype where that is another."""

    name = "native"

    def __init__(self, device: torch.device, exact: bool, native: NativeKernels) -> None:
        super().__init__(device, exact)
        self.native = native

    def linear(self, x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = self.native.linear(x, w, bias, exact=self.exact)
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def linears(
        self,
        x: torch.Tensor,
        weights: Sequence[QuantTensor],
        biases: Sequence[torch.Tensor | None] | None = None,
    ) -> list[torch.Tensor]:
        outs = self.native.linears(x, weights, biases, exact=self.exact)
        return outs if x.dtype is torch.float32 else [out.to(x.dtype) for out in outs]

    def gated_linear(
        self,
        x: torch.Tensor,
        gate: QuantTensor,
        up: QuantTensor,
        kind: Literal["silu", "gelu_tanh"],
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = self.native.gated_linear(x, gate, up, kind, gate_bias, up_bias, exact=self.exact)
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def embedding(self, ids: torch.Tensor, w: QuantTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.native.embedding(ids, w).to(dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
        out = self.native.rms_norm(x, weight, eps, offset)
        return out if x.dtype is torch.float32 else out.to(x.dtype)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
        post_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual.dtype is not torch.float32 or not residual.is_contiguous():
            return super().add_rms_norm(x, residual, weight, eps, offset, post_weight)
        if post_weight is not None:
            x = self.rms_norm(x, post_weight, eps, offset)
        normed, residual = self.native.add_rms_norm(x, residual, weight, eps, offset)
        return (normed if x.dtype is torch.float32 else normed.to(x.dtype)), residual

    def apply_rope(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: Literal["interleaved", "half"]
    ) -> torch.Tensor:
        if not _rotates_in_place(x):
            return super().apply_rope(x, cos, sin, style)
        return self.native.apply_rope(x, cos, sin, style)

    def apply_rope_pair(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        style: Literal["interleaved", "half"],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not (_rotates_in_place(q) and _rotates_in_place(k)):
            return super().apply_rope_pair(q, k, cos, sin, style)
        return self.native.apply_rope(q, cos, sin, style, other=k), k

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        self.native.write_kv(k, v, k_cache, v_cache, slot_mapping)

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
        out = self.native.paged_attention(q, k_cache, v_cache, inputs, kv_map, scale, window, softcap)
        return out if q.dtype is torch.float32 else out.to(q.dtype)

    def gated_activation(
        self, gate: torch.Tensor, up: torch.Tensor, kind: Literal["silu", "gelu_tanh"]
    ) -> torch.Tensor:
        out = self.native.gated_activation(gate, up, kind)
        return out if gate.dtype is torch.float32 else out.to(gate.dtype)


def _rotates_in_place(x: torch.Tensor) -> bool:
    """Whether the native rope takes x: float32, heads next to each other."""
    return x.dtype is torch.float32 and x.stride()[1:] == (x.shape[2], 1)
