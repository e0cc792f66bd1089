"""Failures in words, and what is decided before any rank starts."""

from __future__ import annotations

import os

import pytest
import torch
from rank_fakes import make_config, make_plan

from multitensor.engine.bootstrap import (
    Bootstrap,
    Failure,
    cpu_threads_per_rank,
    describe_failure,
    device_kind,
    rank_environment,
)
from multitensor.engine.torchrun import torchrun_world
from multitensor.errors import CheckFailed, DoesNotFit, InputError, RankFailed


def test_bootstrap_travels_through_a_memfd() -> None:
    sent = Bootstrap(make_plan(3), make_config("x"), "a:b", 2)
    fd = sent.to_memfd()
    assert Bootstrap.from_memfd(fd) == sent
    assert Bootstrap.from_memfd(fd) == sent  # each rank reads it from the start
    os.close(fd)


def test_failures_keep_their_type_over_the_wire() -> None:
    for error in (InputError("bad\nfile"), DoesNotFit("too large"), CheckFailed("differs")):
        failure = Failure.from_bytes(describe_failure(error, 1, "cuda:1").to_bytes())
        assert failure is not None
        assert type(failure.error()) is type(error)
        assert str(failure.error()) == str(error).replace("\n", " ")
        assert not failure.secondary


def test_a_rank_that_only_followed_another_says_so() -> None:
    failure = describe_failure(RankFailed("another rank failed"), 2, "cpu:2")
    assert failure.secondary and failure.message == "rank 2 (cpu:2): another rank failed"


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has 1.00 GiB free."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_does_not_fit(error: BaseException) -> None:
    failure = describe_failure(error, 1, "cuda:1")
    assert isinstance(failure.error(), DoesNotFit)
    assert failure.message.startswith("rank 1 (cuda:1) ran out of memory (") and "\n" not in failure.message


def test_half_a_report_is_none() -> None:
    whole = describe_failure(ValueError("x"), 0, "cpu:0").to_bytes()
    assert Failure.from_bytes(whole[:-3]) is None
    assert Failure.from_bytes(b"") is None
    assert Failure.from_bytes(b"[1]") is None
    assert isinstance(Failure("Nonsense", "text").error(), RankFailed)


def test_device_kind() -> None:
    assert device_kind(make_plan(2)) == "cpu"
    assert device_kind(make_plan(2, "cuda")) == "cuda"
    cpu, cuda = make_plan(1), make_plan(2, "cuda")
    mixed = type(cuda)(**{**vars(cuda), "ranks": (cpu.ranks[0], cuda.ranks[1])})
    with pytest.raises(InputError, match="not supported yet"):
        device_kind(mixed)


def test_threads_are_dealt_out() -> None:
    cores = len(os.sched_getaffinity(0))
    assert cpu_threads_per_rank(make_plan(1), {}) == cores
    assert cpu_threads_per_rank(make_plan(7), {}) == max(1, cores // 7)
    assert cpu_threads_per_rank(make_plan(1), {"OMP_NUM_THREADS": "1"}) == 1
    assert cpu_threads_per_rank(make_plan(1), {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}) == cores


def test_the_users_openmp_settings_are_kept() -> None:
    assert rank_environment({}, 3)["OMP_NUM_THREADS"] == "3"
    assert "GOMP_SPINCOUNT" in rank_environment({}, 3)
    assert "GOMP_SPINCOUNT" not in rank_environment({"OMP_WAIT_POLICY": "active"}, 3)


def test_torchrun_world() -> None:
    assert torchrun_world({}) is None
    assert torchrun_world({"WORLD_SIZE": "1", "RANK": "0"}) is None
    one = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    world = torchrun_world(one)
    assert world is not None and (world.rank, world.size) == (1, 2)
    again = torchrun_world({**one, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert again is not None and again.socket_name != world.socket_name
    with pytest.raises(InputError, match="one host"):
        torchrun_world({**one, "WORLD_SIZE": "4"})
