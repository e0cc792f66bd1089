"""From a layer's input to its queries, and to keys and values in the cache: what a kernel may do in one go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from multitensor.kernels.quant_tensor import QuantTensor


@dataclass(frozen=True)
class Projection:
    """Query, key and value of a layer, on one rank.

    weights: [heads x head_dim, hidden] each. biases: of each, or None where none has one. q_norm, k_norm: float32
    [head_dim], RMS norms of each head before the rotation, both or neither. style: of the rotation.
    """

    weights: tuple[QuantTensor, QuantTensor, QuantTensor]
    biases: tuple[torch.Tensor | None, ...] | None
    head_dim: int
    style: Literal["interleaved", "half"]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float

    @property
    def query_heads(self) -> int:
        return self.weights[0].rows // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.weights[1].rows // self.head_dim
