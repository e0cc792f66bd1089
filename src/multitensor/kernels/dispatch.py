"""(device, exactness) -> the kernels that a rank's model calls. Chosen once a rank; the model knows only `Kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from multitensor.kernels import reference
from multitensor.kernels.attention import HeadGroups
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.quant_tensor import QuantTensor


class Kernels:
    """Plain torch on any device: the base of every faster set, which overrides what it does better.

    T: tokens of the step. Results are in x's dtype. A method may overwrite only what it says it does.
    """

    name = "torch"

    def __init__(self, device: torch.device, exact: bool) -> None:
        self.device = device
        self.exact = exact
        self._head_groups: dict[tuple[tuple[int, ...], int], HeadGroups] = {}

    def linear(self, x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, w.cols] -> [T, w.rows]; see reference.linear."""
        return reference.linear(x, w, bias)

    def embedding(self, ids: torch.Tensor, w: QuantTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Integer ids [T] -> rows [T, w.cols]; an id outside [0, w.rows) gives zeros (another rank holds it)."""
        return reference.embedding(ids, w, dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
        """Over the last axis of x, any shape; weight [last axis], to which offset is added."""
        return reference.rms_norm(x, weight, eps, offset)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """residual += x, in place; returns (rms_norm(residual), residual)."""
        return reference.add_rms_norm(x, residual, weight, eps, offset)

    def apply_rope(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: Literal["interleaved", "half"]
    ) -> torch.Tensor:
        """x [T, H, D]; cos and sin float32 [T, R/2], R <= D. May rotate x in place and return it."""
        return reference.apply_rope(x, cos, sin, style)

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """k, v [T, KV heads, D] into caches [blocks, block_size, KV heads, D] at int64 slots [T]."""
        reference.write_kv(k, v, k_cache, v_cache, slot_mapping)

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        inputs: AttentionInputs,
        kv_map: Sequence[int],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """q [T, query heads, D], after write_kv of the step's own keys -> [T, query heads, D]."""
        key = (tuple(kv_map), k_cache.shape[2])
        groups = self._head_groups.get(key)
        if groups is None:
            groups = self._head_groups[key] = HeadGroups(*key, q.device)
        return reference.paged_attention(q, k_cache, v_cache, inputs, groups, scale, window, softcap)

    def gated_activation(
        self, gate: torch.Tensor, up: torch.Tensor, kind: Literal["silu", "gelu_tanh"]
    ) -> torch.Tensor:
        """activation(gate) * up, elementwise."""
        return reference.gated_activation(gate, up, kind)


def make_kernels(device: torch.device, exact: bool, threads: int | None = None) -> Kernels:
    """The best kernels for a device. exact: activations are never rounded to 8 bits. threads: CPU threads of this
    rank's native kernels (None: torch's number)."""
    return Kernels(device, exact)
