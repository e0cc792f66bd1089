"""A group of tensor parallel ranks: an explicit handle, no globals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from multitensor.kernels import reference
from multitensor.parallel.host_memory import HostMemory
from multitensor.parallel.peer_memory import PeerMemory
from multitensor.parallel.reduction import Reduction
from multitensor.parallel.wire import WireName


class Group(ABC):
    """All methods are collective: every rank calls them in the same order with the same shapes.

    Sums are taken in rank order, so that all ranks hold the same bits. A rank that dies or aborts makes the others
    raise RankFailed instead of waiting for ever.

    kernels: what computes the norm of `reduce_add_norm`: the plain reference until the rank sets its own handle
    (anything with an `add_rms_norm` of that signature).
    seconds: spent in sums and gathers so far, waiting for slower ranks included; None where that is not measured.
    peer_memory: GPUs' memory that all ranks reach, once `open_peer_memory` has found it to work; carve from it alike on
    all ranks. no_peer_memory: why there is none. host_memory, no_host_memory: the same of memory of the host, which is
    opened only where there is no peer memory.
    """

    rank: int
    size: int
    kernels: Any = reference
    seconds: float | None = None
    peer_memory: PeerMemory | None = None
    no_peer_memory: str = "the ranks are not several GPUs"
    host_memory: HostMemory | None = None
    no_host_memory: str = "the ranks are not several GPUs"
    overlaps: bool = False

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
    def barrier(self) -> None:
        """Returns on every rank once all ranks have called it."""

    def open_peer_memory(self, nbytes: int) -> None:  # noqa: B027 - most groups have none
        """Collective, once: sets `peer_memory` to a buffer of so many bytes on every rank, or `no_peer_memory` to the
        reason why not. Waits for a probe that has run since the group was made. Raises InputError where peer memory
        was demanded and there is none."""

    def open_host_memory(self, nbytes: int) -> None:  # noqa: B027 - most groups have none
        """Collective, once, after `open_peer_memory`: where there is no peer memory, sets `host_memory` to a mailbox
        of so many bytes a rank, or `no_host_memory` to the reason why not."""

    def choose_reductions(  # noqa: B027 - most groups have no choice
        self, hidden: int, vocabulary: Sequence[int], dtype: torch.dtype, wire: WireName = "exact"
    ) -> None:
        """Collective, after `open_peer_memory` and `open_host_memory`: decides by timing how sums of rows [T, hidden]
        travel, the hidden states being `dtype`. vocabulary: columns of each rank's logits. wire: of large sums through
        the host's memory."""

    def fuses(self, partial: torch.Tensor, residual: torch.Tensor) -> bool:
        """Whether `reduce_add_norm_into` is one launch for such tensors."""
        return False

    def describe_reductions(self) -> dict[str, Any]:
        """small: how sums of few rows travel, in two words; why: why not over peer memory, or None; warning: what
        people should be told of that, or None; microseconds: by number of rows and way, as timed, with the norm.
        large: how sums of many rows travel; large_why: why not through the host's memory, where there is some, or why
        with torch's operations;
        large_microseconds: as timed, without the norm."""
        small = "none" if self.size == 1 else "host memory"
        told: dict[str, Any] = {"small": small, "why": None, "warning": None, "microseconds": {}}
        return {**told, "large": small, "large_why": None, "large_microseconds": {}}

    def abort(self, reason: str) -> None:  # noqa: B027 - a group of one has nobody to tell
        """Makes every other rank's pending and future calls raise RankFailed, where the backend can. Does not wait."""

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
        """The visible reduction of a layer: residual += post_norm(all_reduce(partial)), in place and in residual's own
        dtype; returns (rms_norm(residual) * norm_weight in partial's dtype, residual). All [T, hidden]; the weights
        [hidden]; norms in float32. Fused by backends that can."""
        total = self.all_reduce(partial)
        normed, residual = self.kernels.add_rms_norm(total, residual, norm_weight, eps, post_weight=post_norm_weight)
        return normed, residual

    def start_reduce_add_norm(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        post_norm_weight: torch.Tensor | None = None,
    ) -> Reduction:
        """Begins `reduce_add_norm` of some of a step's rows, so that others can be computed while the sum travels. Here
        it is over at once; groups that can do better override it."""
        normed, residual = self.reduce_add_norm(partial, residual, norm_weight, eps, post_norm_weight)
        return Reduction.done(normed, residual)

    def reduce_add_norm_into(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        post_norm_weight: torch.Tensor | None = None,
    ) -> None:
        """`reduce_add_norm` for CUDA graphs: residual float32, the norm into `out`, only kernels that a graph can
        hold. `kernels` must be the CUDA ones."""
        total = self.all_reduce(partial)
        add_norm = self.kernels.decode_kernels.add_rms_norm
        add_norm(residual, total, norm_weight, eps, out, post_weight=post_norm_weight)


class SingleGroup(Group):
    """One rank: nothing to exchange."""

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self.seconds = 0.0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather_last(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        check_gather(x, sizes, 0, 1)
        return x

    def gather_objects(self, value: object) -> list[object]:
        return [value]

    def barrier(self) -> None:
        return None


def check_gather(x: torch.Tensor, sizes: Sequence[int], rank: int, size: int) -> None:
    """Raises ValueError unless x is [T, sizes[rank]], with one size a rank: a mismatch would corrupt silently."""
    if len(sizes) != size or x.dim() != 2 or x.shape[1] != sizes[rank]:
        raise ValueError(f"rank {rank} of {size} gathers {tuple(x.shape)} where sizes are {tuple(sizes)}")


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a sum over ranks is taken: float32 for the narrow floats, else the tensor's own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
