"""Both ends of the vocabulary, cut over the ranks: ids to hidden states, hidden states to logits."""

from __future__ import annotations

import torch

from multitensor.architectures.spec import ModelSpec
from multitensor.kernels.dispatch import Kernels
from multitensor.model.linear import Weights, matrix
from multitensor.parallel.group import Group
from multitensor.sharding.plan import Plan

EMBEDDING = "token_embd.weight"
LM_HEAD = "output.weight"


def lm_head_name(spec: ModelSpec) -> str:
    return EMBEDDING if spec.tied_embeddings else LM_HEAD


class VocabularyEmbedding:
    """Each rank looks up the ids that it holds; the others' rows are zero, so the sum is the embedding, exactly."""

    def __init__(self, plan: Plan, rank: int, weights: Weights, kernels: Kernels, group: Group) -> None:
        self.kernels = kernels
        self.group = group
        self.hidden_size = plan.spec.hidden_size
        self.scale = plan.spec.embedding_scale
        self.rows = plan.ranks[rank].vocabulary
        self.weight = matrix(weights, EMBEDDING) if self.rows.size else None
        self.is_cut = plan.size > 1

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 ids [T] -> float32 [T, hidden], equal on all ranks."""
        x = self.partial(ids)
        return self.group.all_reduce(x) if self.is_cut else x

    def partial(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 ids [T] -> float32 [T, hidden]: this rank's rows, zeros for ids of others'; the ranks' sum is the
        embedding."""
        if self.weight is None:
            return torch.zeros((ids.shape[0], self.hidden_size), dtype=torch.float32, device=ids.device)
        x = self.kernels.embedding(ids - self.rows.start, self.weight)
        return x * self.scale if self.scale != 1.0 else x


class LMHead:
    """Hidden states -> logits: each rank makes those of its rows, all ranks get all of them."""

    def __init__(self, plan: Plan, rank: int, weights: Weights, kernels: Kernels, group: Group) -> None:
        self.kernels = kernels
        self.group = group
        self.sizes = tuple(r.vocabulary.size for r in plan.ranks)
        self.softcap = plan.spec.logit_softcap
        self.weight = matrix(weights, lm_head_name(plan.spec)) if self.sizes[rank] else None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden], normalised -> float32 [S, vocabulary], equal on all ranks."""
        return self.gathered(self._local(hidden))

    def gathered(self, local: torch.Tensor) -> torch.Tensor:
        """Every rank's logits [S, its rows] -> float32 [S, vocabulary], equal on all ranks."""
        logits = self.group.all_gather_last(local, self.sizes) if len(self.sizes) > 1 else local
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def _local(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's logits."""
        if self.weight is None:
            return hidden.new_zeros((hidden.shape[0], 0), dtype=torch.float32)
        return self.kernels.logits(hidden, self.weight)
