"""Which way a small sum over GPU ranks takes, decided by timing both when the ranks start.

NCCL moves the sum and a second kernel adds and normalises; over peer memory, or through mailboxes in the host's
memory where GPUs do not reach each other's, one launch does everything (kernels/cuda/reduce.cu), where few tokens
make the traffic small. Neither is always the faster. Mailboxes have run for ranks that share one GPU, not yet for
two: they are used only when their sums have also come out right, bit for bit, on these GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from multitensor.errors import DoesNotFit
from multitensor.kernels.cuda.reduce import PATIENCE_SECONDS, PeerGather, PeerReduction
from multitensor.parallel.host_memory import HostMemory
from multitensor.parallel.rank_memory import RankMemory
from multitensor.parallel.trials import NO_ANSWER, TRIAL_MS, failure_of, first_reason
from multitensor.sharding.memory import PEER_GATHER_TOKENS, PEER_TOKENS

if TYPE_CHECKING:
    from multitensor.parallel.group import Group

TRIALS = (1, 8, PEER_TOKENS)  # numbers of tokens that are timed; others go as the next larger one
_CALLS = 20
_REPLAYS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds of one sum with its norm, `tokens` rows: through NCCL, and over shared memory by blocks a token; each
    of the slowest rank."""

    tokens: int
    nccl: float
    peer: dict[int, float]

    @property
    def parts(self) -> int | None:
        """Blocks a token of the fastest way over shared memory; None where NCCL is faster."""
        best = min(self.peer, key=lambda parts: self.peer[parts], default=None)
        return best if best is not None and self.peer[best] < self.nccl else None


def decide(timings: Sequence[Timing]) -> list[tuple[int, int]]:
    """(most tokens, blocks a token) of the sums that take shared memory, ascending; above the last, NCCL."""
    chosen: list[tuple[int, int]] = []
    for timing in sorted(timings, key=lambda timing: timing.tokens):
        if timing.parts is None:
            break
        chosen.append((timing.tokens, timing.parts))
    return chosen


class PeerReductions:
    """What a group does over peer memory or mailboxes: nothing, until `choose` has found where that pays. Collective
    throughout.

    hidden: columns of the sums. vocabulary: columns of every rank's logits. clusters: whether all GPUs have them.
    """

    def __init__(self, memory: RankMemory, hidden: int, vocabulary: Sequence[int], clusters: bool) -> None:
        """Raises DoesNotFit or ValueError where the shapes are not for it."""
        self.memory = memory
        self._mailbox = mailbox = isinstance(memory, HostMemory)
        wanted = PeerReduction.nbytes(memory.size, hidden, PEER_TOKENS, mailbox=mailbox)
        place = memory.table(memory.carve(wanted))
        first = PeerReduction(place, memory.rank, hidden, PEER_TOKENS, mailbox=mailbox)
        self._variants = {1: first, 4: first.split(4)} if clusters and hidden >= 1024 else {1: first}
        self._chosen: list[tuple[int, PeerReduction]] = []
        self._gather: PeerGather | None = None
        self._wrong: str | None = None
        wanted = PeerGather.nbytes(vocabulary, PEER_GATHER_TOKENS, mailbox=mailbox)
        if min(vocabulary) >= (1 if mailbox else 0) and memory.free > wanted + 256:
            place = memory.table(memory.carve(wanted))
            self._gather = PeerGather(place, memory.rank, vocabulary, PEER_GATHER_TOKENS, mailbox=mailbox)
        self.timings: list[Timing] = []

    def choose(self, group: Group, dtype: torch.dtype) -> None:
        """Times both ways, the hidden states being `dtype`, and keeps to what is faster on the slowest rank."""
        self._wrong = self._tried(group, dtype) if self._mailbox else None
        if self._wrong is None:
            self.timings = [self._time(group, tokens, dtype) for tokens in TRIALS]
            self._chosen = [(tokens, self._variants[parts]) for tokens, parts in decide(self.timings)]
        if self._mailbox and self._chosen and self._gather is not None and not self._gather_pays(group, self._gather):
            self._gather = None

    def _gather_pays(self, group: Group, gather: PeerGather) -> bool:
        """Whether one row's gather is faster than NCCL's on the slowest rank."""
        local = torch.zeros(1, gather.sizes[gather.rank], device=gather.device)
        out = torch.empty(1, gather.columns, device=gather.device)
        by_nccl = _seconds(group, lambda: group.all_gather_last(local, gather.sizes), gather.device)
        by_gather = _seconds(group, lambda: gather.gather(local, out), gather.device)
        everyone: list[Any] = group.gather_objects((by_nccl, by_gather))
        return max(own for _, own in everyone) < max(nccl for nccl, _ in everyone)

    def _prepare(self, dtype: torch.dtype) -> None:
        for variant in self._variants.values():
            variant.prepare(dtype, torch.float32)

    def _tried(self, group: Group, dtype: torch.dtype) -> str | None:
        """Whether sums and gathers come out right, and within a time: None, or which rank found what wrong. Before
        anything is chosen, so that the group itself goes through NCCL."""
        trials = [
            partial(_wrong_sum, group, variant, number, tokens, dtype)
            for variant in self._variants.values()
            for number, tokens in enumerate((1, 2, PEER_TOKENS, 1, 1))
        ]
        parts: list[PeerReduction | PeerGather] = list(self._variants.values())
        if self._gather is not None:
            parts.append(self._gather)
            trials += [
                partial(_wrong_gather, group, self._gather, tokens) for tokens in (1, PEER_GATHER_TOKENS, 1, 1, 1)
            ]
        for part in parts:
            part.limit_ms = -TRIAL_MS
        # Compiling must not fail in one rank while others wait for it.
        reason = first_reason(group, partial(failure_of, partial(self._prepare, dtype)))
        for trial in trials:
            reason = reason or first_reason(group, trial)  # the same on all ranks, so all stop at the same trial
        for part in parts:
            part.limit_ms = int(1000 * PATIENCE_SECONDS)
        return reason

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
        name = self.memory.name
        times = {t.tokens: {other: t.nccl} | {f"{name} x {p}": s for p, s in t.peer.items()} for t in self.timings}
        rounded = {tokens: {way: round(1e6 * s, 2) for way, s in ways.items()} for tokens, ways in times.items()}
        small = f"{name} up to {self._chosen[-1][0]} rows" if self._chosen else other
        why = None if self._chosen else self._wrong or f"{other} is faster here"
        return {"small": small, "why": why, "warning": None, "microseconds": rounded}

    def _time(self, group: Group, tokens: int, dtype: torch.dtype) -> Timing:
        device, hidden = self._variants[1].device, self._variants[1].hidden
        part = torch.zeros(tokens, hidden, device=device)
        residual, out = torch.zeros_like(part), torch.zeros_like(part, dtype=dtype)
        weight = torch.ones(hidden, device=device)

        def by_nccl() -> None:
            total = group.all_reduce(part)
            group.kernels.decode_kernels.add_rms_norm(residual, total, weight, 1e-5, out)

        seconds = [_seconds(group, by_nccl, device)]
        for variant in self._variants.values():

            def over_peers(variant: PeerReduction = variant) -> None:
                variant.reduce_add_norm(part, residual, weight, 1e-5, out)

            seconds.append(_seconds(group, over_peers, device))
        everyone: list[Any] = group.gather_objects(seconds)
        nccl, *peer = (max(values) for values in zip(*everyone, strict=True))
        return Timing(tokens, nccl, dict(zip(self._variants, peer, strict=True)))


def _wrong_sum(group: Group, variant: PeerReduction, number: int, tokens: int, dtype: torch.dtype) -> str | None:
    """What is wrong with a sum of random numbers, of which NCCL brings every rank's."""
    shape, device = (tokens, variant.hidden), variant.device
    random = torch.Generator().manual_seed(1000 * number + tokens)
    residual, every = torch.randn(shape, generator=random), torch.randn(group.size, *shape, generator=random)
    residual, own = residual.to(device), every[group.rank].to(device)
    parts = group.all_gather_last(own, [variant.hidden] * group.size).split(variant.hidden, dim=1)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    wanted, out = residual + total, torch.empty(shape, dtype=dtype, device=device)
    ones = torch.ones(variant.hidden, device=device)
    failure = failure_of(partial(variant.reduce_add_norm, own, residual, ones, 1e-5, out))
    if failure is not None:
        return failure
    norm = wanted * torch.rsqrt(wanted.square().mean(dim=-1, keepdim=True) + 1e-5)
    if variant.given_up:
        return NO_ANSWER
    if not torch.equal(residual, wanted) or not torch.allclose(out.float(), norm, rtol=1e-2, atol=1e-2):
        return f"a wrong sum of {tokens} rows"
    return None


def _wrong_gather(group: Group, gather: PeerGather, tokens: int) -> str | None:
    """As _wrong_sum, of a gather."""
    random = torch.Generator().manual_seed(gather.rank)
    local = torch.randn(tokens, gather.sizes[gather.rank], generator=random).to(gather.device)
    wanted = group.all_gather_last(local, gather.sizes)
    out = torch.empty_like(wanted)
    failure = failure_of(partial(gather.gather, local, out))
    if failure is not None:
        return failure
    if gather.given_up:
        return NO_ANSWER
    return None if torch.equal(out, wanted) else f"a wrong gather of {tokens} rows"


def _seconds(group: Group, work: Callable[[], object], device: torch.device) -> float:
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
    """Collective: a group's reductions over its peer memory, or the host's, timed; or why there are none."""
    memory = group.peer_memory or group.host_memory
    if memory is None:
        return group.no_peer_memory
    try:
        capabilities: list[Any] = group.gather_objects(torch.cuda.get_device_capability(memory.device))
        made = PeerReductions(memory, hidden, vocabulary, min(capabilities) >= (9, 0))
    except (DoesNotFit, ValueError) as error:  # of shapes alone, so on all ranks
        return str(error)
    made.choose(group, dtype)
    return made
