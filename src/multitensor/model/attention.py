"""Self-attention on the heads that this rank holds; the result is a partial sum over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from multitensor.architectures.spec import LayerSpec, ModelSpec
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor
from multitensor.kernels.dispatch import Kernels
from multitensor.kernels.projection import Projection
from multitensor.kernels.rows import Rows
from multitensor.model.linear import Weights, matrix, optional_vector, vector
from multitensor.sharding.plan import RankPlan

KVCache = tuple[CacheTensor, CacheTensor]  # keys and values, each [blocks, block_size, local KV heads, head_dim]


@dataclass(frozen=True)
class Step:
    """What all layers share of one step. ropes[i]: cos and sin, float32 [T, R / 2], of ModelSpec.ropes[i]."""

    inputs: AttentionInputs
    ropes: tuple[tuple[torch.Tensor, torch.Tensor], ...]


class Attention:
    """Column-parallel Q, K and V, row-parallel output. Local sizes come from the plan; nothing is divided here.

    adds_bias: this rank adds the output's bias, so that the sum over ranks has it once.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerSpec,
        rank: RankPlan,
        weights: Weights,
        prefix: str,
        kernels: Kernels,
        *,
        adds_bias: bool,
    ) -> None:
        self.kernels = kernels
        self.hidden_size = spec.hidden_size
        self.head_dim = spec.head_dim
        self.n_heads = rank.query_heads.size
        self.n_kv_heads = rank.kv_heads.size
        self.kv_map = rank.kv_map
        self.scale = spec.attention_scale
        self.softcap = spec.attention_softcap
        self.window = layer.window
        self.rope = layer.rope
        self.rope_style = spec.ropes[layer.rope].style
        self.eps = spec.norm_eps
        if self.n_heads == 0:
            return
        query, key, value = (matrix(weights, f"{prefix}attn_{name}.weight") for name in "qkv")
        self.qkv = (query, key, value)
        biases = tuple(optional_vector(weights, f"{prefix}attn_{name}.bias") for name in "qkv")
        self.qkv_biases = biases if any(bias is not None for bias in biases) else None
        self.output = matrix(weights, f"{prefix}attn_output.weight")
        self.output_bias = optional_vector(weights, f"{prefix}attn_output.bias") if adds_bias else None
        self.q_norm = vector(weights, f"{prefix}attn_q_norm.weight") if spec.qk_norm else None
        self.k_norm = vector(weights, f"{prefix}attn_k_norm.weight") if spec.qk_norm else None
        self.projection = Projection(
            self.qkv, self.qkv_biases, self.head_dim, self.rope_style, self.q_norm, self.k_norm, self.eps
        )

    def __call__(self, x: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        """x [T, hidden], normalised -> this rank's part of the sub-layer's output, [T, hidden]."""
        if self.n_heads == 0:
            return x.new_zeros(x.shape)
        angles, slots = step.ropes[self.rope], step.inputs.slot_mapping
        q = self.kernels.project(x, self.projection, *angles, *cache, slots)
        return self.kernels.linear(self._attend(q, step, cache), self.output, self.output_bias)

    def in_parts(self, parts: Sequence[Rows], step: Step, cache: KVCache) -> Iterator[torch.Tensor]:
        """The same for rows that come in parts, T together: each part's partial sums, as soon as they are queued. Each
        part is waited for just before it is multiplied; what lies between the products is done for all at once."""
        if self.n_heads == 0:
            for part in parts:
                yield torch.zeros_like(part.wait())
            return
        angles, slots = step.ropes[self.rope], step.inputs.slot_mapping
        q = self.kernels.project_parts(parts, self.projection, *angles, *cache, slots)
        sizes = [part.shape[0] for part in parts]
        mixed = self._attend(q, step, cache)
        yield from self.kernels.linear_in_parts(mixed, sizes, self.output, self.output_bias)

    def _attend(self, q: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        """Queries [T, heads, head_dim] -> [T, heads x head_dim], over the cache, which holds the step's own keys."""
        keys, values = cache
        mixed = self.kernels.paged_attention(
            q, keys, values, step.inputs, self.kv_map, self.scale, self.window, self.softcap
        )
        return mixed.reshape(q.shape[0], self.n_heads * self.head_dim)
