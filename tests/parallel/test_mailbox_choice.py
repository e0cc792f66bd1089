"""How ranks come to sum few rows through mailboxes, or not: the whole choice, threads summing in the GPUs' place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from thread_lanes import mailboxes

from multitensor.kernels.cuda.reduce import PATIENCE_SECONDS
from multitensor.parallel import peer_reductions
from multitensor.parallel.local_group import LocalGroup
from multitensor.parallel.peer_reductions import TRIALS, PeerReductions, make_peer_reductions

HIDDEN, VOCABULARY, SIZE = 64, (100, 60, 1), 3
SLOW, FAST = 5e-5, 1e-5


class World:
    """What the ranks' stand-ins share: their groups, the fault, and how long which way takes."""

    def __init__(self) -> None:
        self.groups = LocalGroup.make(SIZE)
        self.fault = ""
        self.seconds = {"sum": FAST, "gather": FAST}
        self.limits: list[int] = []


class Sum:
    """In place of PeerReduction."""

    world: World

    def __init__(
        self, places: torch.Tensor, rank: int, hidden: int, tokens: int, *, parts: int = 1, mailbox: bool = False
    ) -> None:
        assert mailbox and places.tolist() == sorted(places.tolist()) and len(places) == SIZE
        self.rank, self.hidden, self.parts, self.device = rank, hidden, parts, places.device
        self.limit_ms, self.given_up = int(1000 * PATIENCE_SECONDS), 0

    nbytes = staticmethod(lambda ranks, hidden, tokens, mailbox: 4 * 3 * hidden * tokens)

    def prepare(self, out: torch.dtype, partial: torch.dtype) -> None:
        if self.world.fault == "does not compile" and self.rank == 1:
            raise RuntimeError("out of registers")

    def takes(self, partial: torch.Tensor, residual: torch.Tensor) -> bool:
        return True

    def reduce_add_norm(self, own: Any, residual: Any, weight: Any, eps: float, out: Any) -> None:
        self.world.limits.append(self.limit_ms)
        parts = self.world.groups[self.rank].all_gather_last(own, [HIDDEN] * SIZE).split(HIDDEN, dim=1)
        residual += parts[0] + parts[1] + parts[2]
        if self.world.fault == "wrong sum" and self.rank == 2 and len(own) > 2:
            residual[-1, -1] += 1e-3
        if self.world.fault == "late" and self.rank == 0:
            self.given_up += 1
        out.copy_(residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps))


class Gather:
    """In place of PeerGather."""

    world: World

    def __init__(self, places: Any, rank: int, sizes: Sequence[int], tokens: int, *, mailbox: bool = False) -> None:
        self.rank, self.sizes, self.columns, self.device = rank, tuple(sizes), sum(sizes), places.device
        self.limit_ms, self.given_up = int(1000 * PATIENCE_SECONDS), 0

    nbytes = staticmethod(lambda sizes, tokens, mailbox: 4 * 4 * max(sizes) * tokens)

    def takes(self, local: torch.Tensor, sizes: Sequence[int]) -> bool:
        return True

    def gather(self, local: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(self.world.groups[self.rank].all_gather_last(local, self.sizes))
        if self.world.fault == "wrong gather":
            out[:, 0] += 1


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    for kind in (Sum, Gather):
        monkeypatch.setattr(kind, "world", made, raising=False)
    monkeypatch.setattr(peer_reductions, "PeerReduction", Sum)
    monkeypatch.setattr(peer_reductions, "PeerGather", Gather)
    monkeypatch.setattr(peer_reductions, "_seconds", seconds_of(made))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    yield made


def seconds_of(world: World) -> Callable[..., float]:
    """By which of the ways is timed: NCCL's takes 20 us."""

    def seconds(group: LocalGroup, work: Callable[[], object], device: torch.device) -> float:
        called = work.__code__.co_names
        if "reduce_add_norm" in called:
            return world.seconds["sum"]
        return world.seconds["gather"] if "gather" in called else 2e-5

    return seconds


def choices(world: World) -> list[PeerReductions]:
    """Every rank's."""
    memories = mailboxes(SIZE, 1 << 20)

    def one(rank: int) -> PeerReductions:
        group = world.groups[rank]
        group.host_memory = memories[rank]
        made = make_peer_reductions(group, HIDDEN, VOCABULARY, torch.float16)
        assert isinstance(made, PeerReductions), made
        return made

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(one, range(SIZE)))


def test_what_is_right_and_faster_is_used(world: World) -> None:
    for choice in choices(world):
        rows = torch.zeros(TRIALS[-1], HIDDEN)
        assert choice.reduction(rows, rows) is not None
        assert choice._gather is not None and choice._gather.limit_ms == int(1000 * PATIENCE_SECONDS)
        told = choice.describe("NCCL")
        assert told["small"] == f"host memory up to {TRIALS[-1]} rows" and told["why"] is None
        assert told["microseconds"][1] == {"NCCL": 20.0, "host memory x 1": 10.0}
    assert world.limits and max(world.limits) < 0, "a trial may not end the process"


def test_a_gather_that_is_slower_goes_through_nccl(world: World) -> None:
    world.seconds["gather"] = SLOW
    for choice in choices(world):
        assert choice.gather(torch.zeros(1, VOCABULARY[choice.memory.rank]), VOCABULARY) is None
        assert choice.reduction(torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN)) is not None


def test_sums_that_are_slower_go_through_nccl(world: World) -> None:
    world.seconds["sum"] = SLOW
    for choice in choices(world):
        assert choice.reduction(torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN)) is None
        assert choice.describe("NCCL")["why"] == "NCCL is faster here"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("does not compile", "rank 1 got RuntimeError: out of registers"),
        ("wrong sum", "rank 2 got a wrong sum of 64 rows"),
        ("late", "rank 0 got no answer within 2 s"),
        ("wrong gather", "rank 0 got a wrong gather of 1 rows"),
    ],
)
def test_what_is_wrong_is_not_used(world: World, fault: str, why: str) -> None:
    world.fault = fault
    for choice in choices(world):
        assert choice.reduction(torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN)) is None
        told = choice.describe("NCCL")
        assert (told["small"], told["why"], told["microseconds"]) == ("NCCL", f"through host memory {why}", {})
