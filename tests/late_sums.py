"""A group whose sums over ranks arrive only when they are waited for, and which notices who cannot wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from multitensor.parallel.group import Group
from multitensor.parallel.reduction import Reduction


class LateSums(Group):
    """Another group's sums, late. Between `start_reduce_add_norm` and `wait` the partial sums and the rows of the
    residual hold NaN: whoever reads them too early carries it on, whoever writes there is found at the wait.

    under_way: sums begun and not waited for. most: how many there ever were at a time. log: "start" and "wait", in
    order.
    """

    overlaps = True

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.size = group.rank, group.size
        self.under_way: list[torch.Tensor] = []
        self.most = 0
        self.log: list[str] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(x)

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        assert not self.under_way
        return self.group.all_gather_last(x, sizes)

    def gather_objects(self, value: object) -> list[Any]:
        return self.group.gather_objects(value)

    def barrier(self) -> None:
        self.group.barrier()

    def start_reduce_add_norm(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        post_norm_weight: torch.Tensor | None = None,
    ) -> Reduction:
        assert not residual.isnan().any(), "the residual of a sum that was not waited for"
        assert not partial.isnan().any(), "a partial sum made of what was not there yet"
        mine, before = partial.clone(), residual.clone()
        partial.fill_(float("nan"))
        residual.fill_(float("nan"))
        self.under_way.append(residual)
        self.most = max(self.most, len(self.under_way))
        self.log.append("start")

        def finish() -> torch.Tensor:
            assert self.under_way.pop(0) is residual, "sums are waited for in the order in which they began"
            assert partial.isnan().all() and residual.isnan().all(), "written while its sum travelled"
            self.log.append("wait")
            residual.copy_(before)
            return self.reduce_add_norm(mine, residual, norm_weight, eps, post_norm_weight)[0]

        return Reduction(partial, residual, finish)
