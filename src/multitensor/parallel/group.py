"""A group of tensor parallel ranks: an explicit handle, no globals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch


class Group(ABC):
    """All methods are collective: every rank calls them in the same order with the same shapes.

    Sums are taken in rank order, so that all ranks hold the same bits. A rank that dies or aborts makes the others
    raise RankFailed instead of waiting for ever.
    """

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of x (any shape, same on all ranks); may return x itself, overwritten."""

    @abstractmethod
    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """x: [T, sizes[rank]] -> [T, sum(sizes)], rank order along the last axis; sizes may differ and be 0."""

    @abstractmethod
    def gather_objects(self, value: object) -> list[object]:
        """Small picklable values, one a rank, in rank order, on every rank. Slow path: checks and reports only."""

    @abstractmethod
    def barrier(self) -> None: ...

    def close(self) -> None:  # noqa: B027 - most groups hold nothing
        """Release what the group holds; safe to call twice."""

    def reduce_add_norm(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        post_norm_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The visible reduction of a layer: residual += post_norm(all_reduce(partial)); returns
        (rms_norm(residual) * norm_weight, residual). All [T, hidden]; fused by backends that can."""
        raise NotImplementedError
