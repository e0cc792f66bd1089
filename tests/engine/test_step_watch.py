"""Whose fault a silence is, and which time counts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn

import pytest

from multitensor.engine import step_watch
from multitensor.engine.step_watch import StepWatch, describe_silence, step_seconds


class Late(Exception):
    pass


def late() -> NoReturn:
    raise Late


def test_gaps_between_two_looks_count_as_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process was stopped, or the machine slept: so were the ranks."""
    times = iter([0.0, 0.5, 100.0, 101.0, 101.4, 101.6])
    monkeypatch.setattr(step_watch.time, "monotonic", lambda: next(times))
    looks = 0

    def check() -> None:
        nonlocal looks
        looks += 1

    watch = StepWatch(3.0, check, late)
    for _ in range(4):
        watch()
    with pytest.raises(Late):
        watch()
    assert looks == 5


def test_time_counts_from_the_last_news(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.9, 1.8, 2.7, 3.6, 4.5])
    monkeypatch.setattr(step_watch.time, "monotonic", lambda: next(times))
    watch = StepWatch(2.0, lambda: None, late)
    watch()
    watch()
    watch.news()
    watch()
    watch()
    with pytest.raises(Late):
        watch()


def test_without_a_limit_nothing_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(step_watch.time, "monotonic", lambda: now[0])
    watch = StepWatch(0.0, lambda: None, late)
    for _ in range(1000):
        now[0] += 1.0
        watch()


def test_what_the_ranks_raise_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise ValueError

    monkeypatch.setattr(step_watch.time, "monotonic", iter([0.0, 9.0]).__next__)
    with pytest.raises(ValueError):
        StepWatch(0.5, check, late)()


@pytest.mark.parametrize(
    ("letter", "behind", "told"),
    [
        ("S", (), "it is not known which of the 2 ranks hangs"),
        ("S", (1,), "rank 1 (cuda:1), process {pid}, has not taken it up"),
        ("D", (), "rank 1 (cuda:1), process {pid}, hangs in the kernel"),
        ("T", (1,), "rank 1 (cuda:1), process {pid}, is stopped"),
        ("", (1,), "rank 1 (cuda:1), process {pid}, has not taken it up"),
    ],
)
def test_which_rank_it_is(letter: str, behind: tuple[int, ...], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.getpid()
    states: dict[int, str] = {pid: letter, 1: "S"}
    state: Callable[[int], str] = states.__getitem__
    monkeypatch.setattr(step_watch, "_state", state)
    failure = describe_silence("no answer to a step", 120.0, ("cuda:0", "cuda:1"), {0: 1, 1: pid}, behind)
    assert failure.message == f"no answer to a step within 120 s: {told.format(pid=pid)}"
    assert failure.kind == "RankFailed" and not failure.secondary


def test_the_state_of_this_process_and_of_none() -> None:
    assert step_watch._state(os.getpid()) == "R"
    assert step_watch._state(2**22 + 1) == ""


def test_ranks_on_cpus_get_time_for_what_they_have_to_do() -> None:
    assert step_seconds(None, "cpu", 512, 5_000_000_000) == step_seconds(None, "cpu") == 600.0
    assert step_seconds(None, "cpu", 2048, 40_000_000_000) == 8 * 600.0
    assert step_seconds(None, "cuda", 4096, 140_000_000_000) == 120.0
    assert step_seconds(5.0, "cpu", 4096, 140_000_000_000) == 5.0 and step_seconds(0, "cpu", 4096) == 0.0
