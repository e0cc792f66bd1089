"""What a block finds among the rank's weights: slices of matrices, norm weights and biases, by canonical name.

A rank may hold nothing of a matrix (more ranks than heads): then the name is absent, and the block computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from multitensor.kernels.quant_tensor import QuantTensor

Weights = Mapping[str, QuantTensor | torch.Tensor]


def matrix(weights: Weights, name: str) -> QuantTensor:
    """The rank's slice of a matrix. Raises KeyError when the rank holds nothing of it."""
    weight = weights[name]
    if not isinstance(weight, QuantTensor):
        raise TypeError(f"{name} is a vector; a matrix is expected")
    return weight


def vector(weights: Weights, name: str) -> torch.Tensor:
    """The rank's part of a norm weight or a bias, float32. Raises KeyError when the rank holds nothing of it."""
    weight = weights[name]
    if isinstance(weight, QuantTensor):
        raise TypeError(f"{name} is a matrix; a vector is expected")
    return weight


def optional_vector(weights: Weights, name: str) -> torch.Tensor | None:
    """As `vector`; None where the model, or the rank, has none."""
    return vector(weights, name) if name in weights else None


def joint_matrices(n_layers: int) -> list[tuple[str, ...]]:
    """Names of the matrices of every layer that take the same activations: query, key and value; gate and up."""
    groups = [("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")]
    return [tuple(f"blk.{i}.{name}.weight" for name in group) for i in range(n_layers) for group in groups]
