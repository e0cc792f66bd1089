"""Which way small sums go, and what a group does that cannot, or may not, use peer memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_fakes import run_forked

from multitensor.engine.prepare import prepare
from multitensor.errors import InputError
from multitensor.kernels.cuda.layer import places_bytes
from multitensor.kernels.cuda.reduce import PeerGather, PeerReduction
from multitensor.parallel.group import SingleGroup
from multitensor.parallel.local_group import LocalGroup
from multitensor.parallel.peer_reductions import TRIALS, Timing, _wrong_sum, decide
from multitensor.parallel.torch_group import TorchGroup, make_torch_group
from multitensor.parallel.trials import first_reason
from multitensor.sharding.memory import (
    HOST_CHUNK_BYTES,
    HOST_SLOTS,
    PEER_GATHER_TOKENS,
    PEER_TOKENS,
    host_memory_bytes,
    peer_memory_bytes,
)
from synthetic import write_gguf

CPU = torch.device("cpu")


def test_the_fastest_of_the_slowest_ranks_is_chosen() -> None:
    timings = [
        Timing(1, 14e-6, {1: 6e-6, 4: 5e-6}),
        Timing(8, 15e-6, {1: 7e-6, 4: 8e-6}),
        Timing(64, 20e-6, {1: 30e-6}),
    ]
    assert decide(timings) == [(1, 4), (8, 1)]


def test_nccl_where_it_is_faster_or_alone() -> None:
    assert decide([Timing(1, 5e-6, {1: 6e-6, 4: 7e-6}), Timing(8, 15e-6, {1: 7e-6})]) == []
    assert decide([Timing(1, 5e-6, {})]) == []


seconds = st.floats(1e-7, 1e-3)


@given(st.lists(st.tuples(seconds, seconds, seconds), min_size=3, max_size=3))
def test_a_chosen_way_is_never_slower_than_nccl(table: list[tuple[float, float, float]]) -> None:
    timings = [Timing(n, nccl, {1: one, 4: four}) for n, (nccl, one, four) in zip(TRIALS, table, strict=True)]
    chosen = decide(timings)
    assert [tokens for tokens, _ in chosen] == list(TRIALS[: len(chosen)])
    for (_, parts), timing in zip(chosen, timings, strict=False):
        assert timing.peer[parts] == min(timing.peer.values()) < timing.nccl


@pytest.mark.parametrize("devices", ["24GiB,24GiB", "24GiB,12GiB,24GiB"])
def test_the_buffer_that_is_planned_holds_what_is_carved(tmp_path: Path, devices: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", types="Q8_0", hidden=64, n_heads=4, n_kv_heads=2, vocab=320)
    plan = prepare(path, devices=devices, allow_planned_devices=True).plan
    sums = PeerReduction.nbytes(plan.size, plan.spec.hidden_size, PEER_TOKENS)
    vocabulary = [rank.vocabulary.size for rank in plan.ranks]
    logits = PeerGather.nbytes(vocabulary, PEER_GATHER_TOKENS)
    assert peer_memory_bytes(plan) >= 2 * sums + logits + 4 * 256
    sums = PeerReduction.nbytes(plan.size, plan.spec.hidden_size, PEER_TOKENS, mailbox=True)
    logits = PeerGather.nbytes(vocabulary, PEER_GATHER_TOKENS, mailbox=True)
    layers = sum(places_bytes(plan.spec.hidden_size, tokens, plan.size) for tokens in (1, 2))
    chunks = 2 * HOST_SLOTS * HOST_CHUNK_BYTES
    assert host_memory_bytes(plan) >= sums + layers + logits + chunks + 8 * 256
    for other in (prepare(path, devices="cpu:2"), prepare(path, devices="24GiB", allow_planned_devices=True)):
        assert peer_memory_bytes(other.plan) == host_memory_bytes(other.plan) == 0


class Variant:
    """Stands for a PeerReduction on the CPU, which gets every rank's part by another way."""

    def __init__(self, group: LocalGroup, fault: str) -> None:
        self.group, self.fault = group, fault
        self.hidden, self.device, self.given_up = 64, CPU, 7 if fault == "late" and group.rank == 1 else 0

    def reduce_add_norm(
        self, own: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        parts = list(self.group.all_gather_last(own, [64] * self.group.size).split(64, dim=1))
        if self.fault == "order":
            parts.reverse()
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        if self.fault == "one value" and self.group.rank == 2:
            total[0, 5] += 0.01
        residual += total
        out.copy_(residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps))
        if self.fault == "norm":
            out *= 1.1


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("", None),
        ("order", "through host memory rank 0 got a wrong sum of 2 rows"),
        ("one value", "through host memory rank 2 got a wrong sum of 2 rows"),
        ("norm", "through host memory rank 0 got a wrong sum of 2 rows"),
        ("late", "through host memory rank 1 got no answer within 2 s"),
    ],
)
def test_a_way_that_sums_wrongly_is_found_out_by_all_ranks(fault: str, wanted: str | None) -> None:
    def one(group: LocalGroup) -> str | None:
        variant: Any = Variant(group, fault)
        return first_reason(group, lambda: _wrong_sum(group, variant, 0, 2, torch.float16))

    assert run_ranks(3, one) == [wanted] * 3


def run_ranks(size: int, work: Callable[[LocalGroup], Any]) -> list[Any]:
    """work(group) in a thread a rank."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, LocalGroup.make(size)))


def gloo(p2p: bool | None) -> list[Any]:
    """What each of two gloo ranks says of its reductions, or why it refused."""
    store = os.memfd_create("store")

    def one(rank: int) -> Any:
        group = make_torch_group(rank, 2, CPU, f"/proc/self/fd/{store}", "gloo", p2p)
        try:
            group.open_peer_memory(1 << 20)
        except InputError as error:
            return str(error)
        group.choose_reductions(64, [100, 60], torch.float16)
        partial, residual = torch.full((3, 64), float(rank + 1)), torch.zeros(3, 64)
        normed, residual = group.reduce_add_norm(partial, residual, torch.ones(64), 0.0)
        gathered = group.all_gather_last(torch.full((2, (100, 60)[rank]), float(rank)), [100, 60])
        group.barrier()
        group.close()
        sums = residual.unique().tolist(), normed.unique().tolist(), gathered.sum().item()
        return group.peer_memory, group.describe_reductions()["small"], sums, os.environ.get("NCCL_P2P_DISABLE")

    try:
        return run_forked(2, one)
    finally:
        os.close(store)


@pytest.mark.processes
def test_ranks_without_nccl_have_no_peer_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    for answer in gloo(None):
        assert answer == (None, "gloo", ([3.0], [1.0], 120.0), None)


@pytest.mark.processes
def test_forbidden_access_is_forbidden_to_nccl_too() -> None:
    for answer in gloo(False):
        assert answer == (None, "gloo", ([3.0], [1.0], 120.0), "1")


@pytest.mark.processes
def test_demanded_access_that_is_not_there_is_an_error() -> None:
    for answer in gloo(True):
        assert answer == (
            "peer-to-peer access was demanded, but the ranks talk through gloo; leave the demand out to use NCCL"
        )


class Small:
    """Stands for PeerReductions that have been timed."""

    def __init__(self, small: str, why: str | None) -> None:
        self.told = {"small": small, "why": why, "warning": None, "microseconds": {1: {"NCCL": 39.0}}}

    def describe(self, other: str) -> dict[str, Any]:
        return dict(self.told)


FEW = "host memory up to 8 rows"


@pytest.mark.parametrize(
    ("small", "large", "p2p", "wanted"),
    [
        (Small(FEW, None), "no room", None, (FEW, "no link", f"sums take {FEW} instead: no link", "no room")),
        (Small(FEW, None), "no room", False, (FEW, "no link", None, "no room")),
        (Small("NCCL", "it is slow"), "no room", False, ("NCCL", "no link; it is slow", None, "no room")),
        ("odd rows", "odd rows", False, ("NCCL", "odd rows; no pages", None, "odd rows")),
        (
            "odd rows",
            "odd rows",
            None,
            ("NCCL", "odd rows; no pages", "take NCCL instead: odd rows; no pages", "odd rows"),
        ),
    ],
)
def test_what_a_group_without_peer_memory_tells(
    small: Any, large: str, p2p: bool | None, wanted: tuple[str, str, str | None, str]
) -> None:
    group = TorchGroup.__new__(TorchGroup)
    group.backend, group._p2p, group._peers, group._large = "nccl", p2p, small, large
    group.no_peer_memory, group.no_host_memory = "no link", "no pages"
    there: Any = object()
    group.host_memory = there
    told = group.describe_reductions()
    assert (told["small"], told["why"], told["large"], told["large_why"]) == (*wanted[:2], "NCCL", wanted[3])
    warning = told["warning"]
    assert warning is None if wanted[2] is None else warning.endswith(wanted[2])


def test_other_groups_say_that_there_is_nothing_to_choose() -> None:
    for group, small in ((SingleGroup(), "none"), (LocalGroup.make(2)[0], "host memory")):
        group.open_peer_memory(1 << 20)
        group.choose_reductions(64, [64], torch.float16)
        assert group.peer_memory is None
        assert group.describe_reductions() == {
            "small": small,
            "why": None,
            "warning": None,
            "microseconds": {},
            "large": small,
            "large_why": None,
            "large_microseconds": {},
        }
