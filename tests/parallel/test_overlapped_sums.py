"""Reductions that are begun and waited for: what every group gives, and what one of GPUs asks of its streams."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_groups import part, run_gloo, run_processes, run_threads

from multitensor.parallel.group import Group, SingleGroup
from multitensor.parallel.reduction import Reduction
from multitensor.parallel.torch_group import TorchGroup

Run = Callable[[int, Callable[[Group], Any]], list[Any]]
WEIGHT, POST = part(100, (96,), torch.float32), part(101, (96,), torch.float32)


def both_ways(group: Group) -> list[bool]:
    """Whether reductions of parts of rows, two under way at a time, have the bits of the whole's."""
    equal = []
    for dtype in (torch.float32, torch.bfloat16):
        for post in (None, POST):
            whole, cut = part(102, (7, 96), torch.float32), part(102, (7, 96), torch.float32)
            normed, _ = group.reduce_add_norm(part(group.rank, (7, 96), dtype), whole, WEIGHT, 1e-5, post)
            partial = part(group.rank, (7, 96), dtype)
            begun = [
                group.start_reduce_add_norm(partial[rows], cut[rows], WEIGHT, 1e-5, post)
                for rows in (slice(0, 3), slice(3, 7))
            ]
            assert [(each.shape, each.dtype) for each in begun] == [((3, 96), dtype), ((4, 96), dtype)]
            found = [each.wait() for each in begun]
            assert all(each.wait() is rows for each, rows in zip(begun, found, strict=True))  # again: the same
            assert all(each.residual.data_ptr() == cut[3 * i].data_ptr() for i, each in enumerate(begun))
            equal += [torch.equal(torch.cat(found), normed), torch.equal(cut, whole)]
    return equal


@pytest.mark.parametrize("run", [run_threads, run_processes, run_gloo])
def test_parts_have_the_bits_of_the_whole(run: Run) -> None:
    assert run(3, both_ways) == [[True] * 8] * 3


def test_a_group_of_one() -> None:
    assert both_ways(SingleGroup()) == [True] * 8


def test_what_it_held_is_let_go_after_the_wait() -> None:
    partial, normed, calls = torch.zeros(2, 3), torch.zeros(2, 3), []
    reduction = Reduction(partial, torch.zeros(2, 3), lambda: calls.append(1) or normed)  # type: ignore[func-returns-value]
    held = weakref.ref(partial)
    del partial
    assert held() is not None and not calls
    assert reduction.wait() is normed and reduction.wait() is normed
    assert held() is None and calls == [1]


class Streams:
    """Takes the place of torch.cuda's streams. log: what was queued where, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current = self.compute = Stream(self, "compute")
        self.made: list[Stream] = []
        monkeypatch.setattr(torch.cuda, "Stream", self.make)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.using)

    def make(self, device: torch.device, priority: int) -> Stream:
        self.made.append(Stream(self, f"side {priority}"))
        return self.made[-1]

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def queue(self, what: str) -> None:
        self.log.append(f"{self.current.name}: {what}")


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name, self.marks = streams, name, 0

    def wait_stream(self, other: Stream) -> None:
        self.streams.log.append(f"{self.name}: wait for {other.name}")

    def record_event(self) -> str:
        self.marks += 1
        self.streams.log.append(f"{self.name}: mark {self.marks}")
        return f"mark {self.marks}"

    def wait_event(self, event: str) -> None:
        self.streams.log.append(f"{self.name}: wait for {event}")


class Norms:
    """Kernels that say where they run."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        self.streams.queue(f"norm of {x.shape[0]} rows")
        residual += x
        return x.clone(), residual


def gpu_group(streams: Streams, peer_rows: int = 0) -> TorchGroup:
    """One of two ranks whose sums NCCL makes, those of up to peer_rows rows excepted."""
    group = TorchGroup.__new__(TorchGroup)
    group.rank, group.size, group.device, group.backend = 0, 2, torch.device("cpu"), "nccl"
    group._side, group.overlaps, group.kernels = None, True, Norms(streams)

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        streams.queue(f"sum of {x.shape[0]} rows")
        return x.mul_(2)

    def peers(partial: torch.Tensor, residual: torch.Tensor) -> Any:
        return OnPeers(streams) if partial.shape[0] <= peer_rows else None

    group.all_reduce, group._peers_for = all_reduce, peers  # type: ignore[method-assign]
    return group


class OnPeers:
    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def reduce_add_norm(self, partial: torch.Tensor, *arguments: Any, **options: Any) -> None:
        self.streams.queue(f"sum and norm of {partial.shape[0]} rows")


def test_a_gpus_sums_travel_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun after what made the partial sums, taken up after the sum alone, not after what else was queued."""
    streams = Streams(monkeypatch)
    group = gpu_group(streams)
    residual = torch.zeros(5, 4)
    first = group.start_reduce_add_norm(torch.ones(2, 4), residual[:2], torch.ones(4), 1e-5)
    second = group.start_reduce_add_norm(torch.ones(3, 4), residual[2:], torch.ones(4), 1e-5)
    assert not residual.any()  # it is not touched before it is waited for
    first.wait(), first.wait(), second.wait()
    assert streams.log == [
        "side -1: wait for compute",
        "side -1: sum of 2 rows",
        "side -1: mark 1",
        "side -1: wait for compute",
        "side -1: sum of 3 rows",
        "side -1: mark 2",
        "compute: wait for mark 1",
        "compute: norm of 2 rows",
        "compute: wait for mark 2",
        "compute: norm of 3 rows",
    ]
    assert (residual == 2).all() and len(streams.made) == 1


def test_few_rows_go_over_peers_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    group = gpu_group(streams, peer_rows=2)
    for rows in (2, 3):
        group.start_reduce_add_norm(torch.ones(rows, 4), torch.zeros(rows, 4), torch.ones(4), 1e-5)
    assert streams.log[0] == "compute: sum and norm of 2 rows"
    assert streams.log[1:] == ["side -1: wait for compute", "side -1: sum of 3 rows", "side -1: mark 1"]
