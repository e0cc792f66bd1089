"""The gated feed-forward network on the units that this rank holds; the result is a partial sum over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from multitensor.architectures.spec import ModelSpec
from multitensor.kernels.dispatch import Kernels
from multitensor.kernels.rows import Rows
from multitensor.model.linear import Weights, matrix, optional_vector
from multitensor.sharding.plan import RankPlan


class FeedForward:
    """Column-parallel gate and up, row-parallel down. adds_bias: as in Attention."""

    def __init__(
        self, spec: ModelSpec, rank: RankPlan, weights: Weights, prefix: str, kernels: Kernels, *, adds_bias: bool
    ) -> None:
        self.kernels = kernels
        self.activation = spec.activation
        self.size = rank.ffn.size
        if self.size == 0:
            return
        self.gate, self.up, self.down = (
            matrix(weights, f"{prefix}ffn_{name}.weight") for name in ("gate", "up", "down")
        )
        self.gate_bias = optional_vector(weights, f"{prefix}ffn_gate.bias")
        self.up_bias = optional_vector(weights, f"{prefix}ffn_up.bias")
        self.down_bias = optional_vector(weights, f"{prefix}ffn_down.bias") if adds_bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden], normalised -> this rank's part of the sub-layer's output, [T, hidden]."""
        if self.size == 0:
            return x.new_zeros(x.shape)
        kernels = self.kernels
        inner = kernels.gated_linear(x, self.gate, self.up, self.activation, self.gate_bias, self.up_bias)
        return kernels.linear(inner, self.down, self.down_bias)

    def in_parts(self, parts: Sequence[Rows]) -> Iterator[torch.Tensor]:
        """The same for rows that come in parts: as Attention.in_parts."""
        if self.size == 0:
            for part in parts:
                yield torch.zeros_like(part.wait())
            return
        kernels = self.kernels
        inner = kernels.gated_linear_of_parts(parts, self.gate, self.up, self.activation, self.gate_bias, self.up_bias)
        yield from kernels.linear_in_parts(inner, [part.shape[0] for part in parts], self.down, self.down_bias)
