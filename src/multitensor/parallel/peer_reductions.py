"""Which way a small sum over GPU ranks takes, decided by timing both when the ranks start.

NCCL moves the sum and a second kernel adds and normalises; over peer memory one launch does everything (kernels/cuda/
reduce.cu), where GPUs reach each other's memory and few tokens make the traffic small. Neither is always the faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from multitensor.errors import DoesNotFit
from multitensor.kernels.cuda.reduce import PeerGather, PeerReduction
from multitensor.parallel.peer_memory import PeerMemory
from multitensor.sharding.memory import PEER_GATHER_TOKENS, PEER_TOKENS

if TYPE_CHECKING:
    from multitensor.parallel.group import Group

TRIALS = (1, 8, PEER_TOKENS)  # numbers of tokens that are timed; others go as the next larger one
_CALLS = 20
_REPLAYS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds of one sum with its norm, `tokens` rows: through NCCL, and over peer memory by blocks a token; each of
    the slowest rank."""

    tokens: int
    nccl: float
    peer: dict[int, float]

    @property
    def parts(self) -> int | None:
        """Blocks a token of the fastest way over peer memory; None where NCCL is faster."""
        best = min(self.peer, key=lambda parts: self.peer[parts], default=None)
        return best if best is not None and self.peer[best] < self.nccl else None


def decide(timings: Sequence[Timing]) -> list[tuple[int, int]]:
    """(most tokens, blocks a token) of the sums that take peer memory, ascending; above the last, NCCL."""
    chosen: list[tuple[int, int]] = []
    for timing in sorted(timings, key=lambda timing: timing.tokens):
        if timing.parts is None:
            break
        chosen.append((timing.tokens, timing.parts))
    return chosen


class PeerReductions:
    """What a group does over peer memory: nothing, until `choose` has found where that pays. Collective throughout.

    hidden: columns of the sums. vocabulary: columns of every rank's logits.
    """

    def __init__(self, memory: PeerMemory, hidden: int, vocabulary: Sequence[int]) -> None:
        """Raises DoesNotFit or ValueError where the shapes are not for it."""
        wanted = PeerReduction.nbytes(memory.size, hidden, PEER_TOKENS)
        first = PeerReduction(memory.table(memory.carve(wanted)), memory.rank, hidden, PEER_TOKENS)
        capability = torch.cuda.get_device_capability(memory.local.device)
        clusters = (4,) if capability >= (9, 0) and hidden >= 1024 else ()
        self._variants = {1: first} | {parts: first.split(parts) for parts in clusters}
        self._chosen: list[tuple[int, PeerReduction]] = []
        self._gather: PeerGather | None = None
        columns = sum(vocabulary)
        if min(vocabulary) >= 0 and memory.free > PeerGather.nbytes(columns, PEER_GATHER_TOKENS) + 256:
            place = memory.table(memory.carve(PeerGather.nbytes(columns, PEER_GATHER_TOKENS)))
            self._gather = PeerGather(place, memory.rank, vocabulary, PEER_GATHER_TOKENS)
        self.timings: list[Timing] = []

    def choose(self, group: Group, dtype: torch.dtype) -> None:
        """Times both ways, the hidden states being `dtype`, and keeps to what is faster on the slowest rank."""
        self.timings = [self._time(group, tokens, dtype) for tokens in TRIALS]
        self._chosen = [(tokens, self._variants[parts]) for tokens, parts in decide(self.timings)]

    def reduction(self, partial: torch.Tensor, residual: torch.Tensor) -> PeerReduction | None:
        """What sums such a partial result; None: NCCL."""
        for tokens, reduction in self._chosen:
            if partial.shape[0] <= tokens:
                return reduction if reduction.takes(partial, residual) else None
        return None

    def gather(self, local: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor | None:
        """As Group.all_gather_last; None where this is not for it."""
        if not self._chosen or self._gather is None or not self._gather.takes(local, sizes):
            return None
        out = local.new_empty((local.shape[0], sum(sizes)))
        self._gather.gather(local, out)
        return out

    def describe(self, other: str) -> dict[str, Any]:
        """As Group.describe_reductions; other: the name of the other way."""
        times = {t.tokens: {other: t.nccl} | {f"peer memory x {p}": s for p, s in t.peer.items()} for t in self.timings}
        rounded = {tokens: {way: round(1e6 * s, 2) for way, s in ways.items()} for tokens, ways in times.items()}
        small = f"peer memory up to {self._chosen[-1][0]} rows" if self._chosen else other
        why = None if self._chosen else f"{other} is faster here"
        return {"small": small, "why": why, "warning": None, "microseconds": rounded}

    def _time(self, group: Group, tokens: int, dtype: torch.dtype) -> Timing:
        device, hidden = self._variants[1].device, self._variants[1].hidden
        partial = torch.zeros(tokens, hidden, device=device)
        residual, out = torch.zeros_like(partial), torch.zeros_like(partial, dtype=dtype)
        weight = torch.ones(hidden, device=device)

        def by_nccl() -> None:
            total = group.all_reduce(partial)
            group.kernels.decode_kernels.add_rms_norm(residual, total, weight, 1e-5, out)

        seconds = [_seconds(group, by_nccl, device)]
        for variant in self._variants.values():

            def over_peers(variant: PeerReduction = variant) -> None:
                variant.reduce_add_norm(partial, residual, weight, 1e-5, out)

            seconds.append(_seconds(group, over_peers, device))
        everyone: list[Any] = group.gather_objects(seconds)
        nccl, *peer = (max(values) for values in zip(*everyone, strict=True))
        return Timing(tokens, nccl, dict(zip(self._variants, peer, strict=True)))


def _seconds(group: Group, work: Callable[[], None], device: torch.device) -> float:
    """Of one call among many in a CUDA graph, as in a decode step; of the fastest replay."""
    work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            work()
    group.barrier()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 2)]
    for mark in marks[:-1]:
        mark.record()
        graph.replay()
    marks[-1].record()
    torch.cuda.synchronize(device)
    # The first replay uploads the graph and waits for ranks that are late.
    return min(first.elapsed_time(second) for first, second in pairwise(marks[1:])) / 1e3 / _CALLS


def make_peer_reductions(
    group: Group, hidden: int, vocabulary: Sequence[int], dtype: torch.dtype
) -> PeerReductions | str:
    """Collective: a group's reductions over its peer memory, timed; or why there are none."""
    if group.peer_memory is None:
        return group.no_peer_memory
    try:
        made = PeerReductions(group.peer_memory, hidden, vocabulary)
    except (DoesNotFit, ValueError) as error:  # of shapes alone, so on all ranks
        return str(error)
    made.choose(group, dtype)
    return made
