"""A decoder of any architecture that a ModelSpec can tell, on one rank.

The graph of a layer is Megatron's (arXiv:1909.08053): two partial sums, and after each a reduction over the ranks, here
in plain sight. Between reductions the ranks hold the same residual stream, bit for bit. The rows of a long step may be
cut in parts (row_cuts.py), so that a part's sums travel while another part is multiplied: `in_parts`.

The stream is float32 whatever the compute dtype: it grows far beyond what one layer adds, so a narrow stream would lose
more than all other roundings together (in bfloat16 the error of a layer is 5 times larger; Gemma 3 overflows float16).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.dispatch import Kernels
from multitensor.model.attention import Attention, KVCache, Step
from multitensor.model.embedding import LMHead, VocabularyEmbedding
from multitensor.model.feed_forward import FeedForward
from multitensor.model.linear import Weights, optional_vector, vector
from multitensor.model.rope import RopeTable
from multitensor.model.row_cuts import RowCut, uncut
from multitensor.parallel.group import Group
from multitensor.parallel.reduction import Reduction
from multitensor.sharding.plan import Plan

ROPE_FACTORS = "rope_freqs.weight"


class DecoderLayer:
    """One block: two sub-layers, each followed by its reduction over the ranks and the norm after it.

    next_norm is the norm that comes after this block: the following block's first, or the model's last.
    """

    def __init__(self, plan: Plan, rank: int, index: int, weights: Weights, kernels: Kernels, group: Group) -> None:
        spec = plan.spec
        self.group = group
        self.eps = spec.norm_eps
        own = plan.ranks[rank]
        prefix = f"blk.{index}."
        first_with_heads = next(r.rank for r in plan.ranks if r.query_heads.size)
        first_with_ffn = next(r.rank for r in plan.ranks if r.ffn.size)
        self.attention = Attention(
            spec, spec.layers[index], own, weights, prefix, kernels, adds_bias=rank == first_with_heads
        )
        self.feed_forward = FeedForward(spec, own, weights, prefix, kernels, adds_bias=rank == first_with_ffn)
        self.first_norm = vector(weights, f"{prefix}attn_norm.weight")
        self.post_attention_norm = self._post_norm(spec.post_norms, weights, f"{prefix}post_attention_norm.weight")
        self.ffn_norm = vector(weights, f"{prefix}ffn_norm.weight")
        self.post_ffn_norm = self._post_norm(spec.post_norms, weights, f"{prefix}post_ffw_norm.weight")
        last = index == spec.n_layers - 1
        self.next_norm = vector(weights, "output_norm.weight" if last else f"blk.{index + 1}.attn_norm.weight")

    @staticmethod
    def _post_norm(present: bool, weights: Weights, name: str) -> torch.Tensor | None:
        return vector(weights, name) if present else None

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor, step: Step, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalised, residual) before this block -> the same before the next. All [T, hidden]; residual is
        overwritten."""
        partial = self.attention(hidden, step, cache)
        hidden, residual = self.group.reduce_add_norm(
            partial, residual, self.ffn_norm, self.eps, self.post_attention_norm
        )
        partial = self.feed_forward(hidden)
        return self.group.reduce_add_norm(partial, residual, self.next_norm, self.eps, self.post_ffn_norm)

    def in_parts(self, parts: Sequence[Reduction], step: Step, cache: KVCache) -> list[Reduction]:
        """The same for rows that come in parts: while one part's sum travels the next part is multiplied."""
        partials = self.attention.in_parts(parts, step, cache)
        parts = [
            self.group.start_reduce_add_norm(partial, part.residual, self.ffn_norm, self.eps, self.post_attention_norm)
            for partial, part in zip(partials, parts, strict=True)
        ]
        partials = self.feed_forward.in_parts(parts)
        return [
            self.group.start_reduce_add_norm(partial, part.residual, self.next_norm, self.eps, self.post_ffn_norm)
            for partial, part in zip(partials, parts, strict=True)
        ]


class Decoder:
    """This rank's part of the model. All methods are collective: every rank of the group calls them alike."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        weights: Weights,
        kernels: Kernels,
        group: Group,
        dtype: torch.dtype,
        device: torch.device,
        cut_rows: RowCut = uncut,
    ) -> None:
        self.kernels = kernels
        self.eps = plan.spec.norm_eps
        self.dtype = dtype
        self.cut_rows = cut_rows
        self.embedding = VocabularyEmbedding(plan, rank, weights, kernels, group)
        self.layers = [DecoderLayer(plan, rank, i, weights, kernels, group) for i in range(plan.spec.n_layers)]
        self.lm_head = LMHead(plan, rank, weights, kernels, group)
        factors = optional_vector(weights, ROPE_FACTORS)
        self.ropes = [RopeTable(rope, plan.context, factors, device) for rope in plan.spec.ropes]

    def begin(self, inputs: AttentionInputs) -> Step:
        """What all layers of a step share."""
        return Step(inputs, tuple(rope.at(inputs.positions) for rope in self.ropes))

    def first_norm(self, residual: torch.Tensor) -> torch.Tensor:
        """The first block's input of an embedding [T, hidden]."""
        return self.kernels.rms_norm(residual, self.layers[0].first_norm, self.eps).to(self.dtype)

    def forward(self, token_ids: torch.Tensor, inputs: AttentionInputs, caches: Sequence[KVCache]) -> torch.Tensor:
        """int64 ids [T] of a flat batch -> hidden states [T, hidden] after the last norm, equal on all ranks; writes
        the keys and values of the T tokens into the caches, one a layer."""
        step = self.begin(inputs)
        residual = self.embedding(token_ids)
        hidden = self.first_norm(residual)
        sizes = list(self.cut_rows(len(token_ids)))
        if len(sizes) > 1:
            parts = list(map(Reduction.done, hidden.split(sizes), residual.split(sizes)))
            del hidden  # held by the parts as long as it is needed
            for layer, cache in zip(self.layers, caches, strict=True):
                parts = layer.in_parts(parts, step, cache)
            return torch.cat([part.wait() for part in parts])
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, residual = layer(hidden, residual, step, cache)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Some rows of `forward`'s result [S, hidden] -> float32 [S, vocabulary], equal on all ranks."""
        return self.lm_head(hidden)
