"""A rank's loop: steps are begun ahead, and only a step's sampling waits for what grammars allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_ranks import make_config, make_plan

from multitensor.engine.batch import StepInput, StepMasks, StepOutput
from multitensor.engine.rank_loop import serve_rank
from multitensor.parallel.group import SingleGroup

MASK = np.array([6], np.uint32)


class Port:
    """Gives the messages one after the other; notes what the rank does."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages = deque(messages)
        self.events: list[Any] = []

    def receive(self) -> Any:
        return self.messages.popleft()

    def pending(self) -> bool:
        return bool(self.messages)

    def send(self, result: Any) -> None:
        self.events.append(("answer", result[1].step) if result[0] == "step" else result[0])

    def report_progress(self, done: int, total: int) -> None: ...

    def report_seconds(self, compute: float, reduction: float | None) -> None:
        self.events.append(("seconds", compute, reduction))


class Device:
    """A runner whose device finishes a step when it is waited for, or, if it is quick, at once."""

    def __init__(self, events: list[Any], quick: bool) -> None:
        self.events, self.quick = events, quick

    def load(self, progress: Any = None) -> None: ...

    def step(self, step: StepInput) -> StepOutput:
        raise AssertionError("its device works on by itself")

    def forward(self, step: StepInput) -> StepInput:
        self.events.append(("forward", step.step))
        return step

    def sample(self, forwarded: StepInput, late_masks: Mapping[int, np.ndarray]) -> int:
        self.events.append(("sample", forwarded.step, sorted(late_masks)))
        return forwarded.step

    def is_done(self, begun: int) -> bool:
        return self.quick

    def finish(self, begun: int) -> StepOutput:
        return StepOutput(begun, np.zeros(1, np.int32))

    def close(self) -> None:
        self.events.append("closed")


class Simple:
    """A runner that does a step in one call."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def load(self, progress: Any = None) -> None: ...

    def step(self, step: StepInput) -> StepOutput:
        self.events.append(("step", step.step, sorted(step.masks), step.late_masks))
        return StepOutput(step.step, np.zeros(1, np.int32))

    def close(self) -> None:
        self.events.append("closed")


def step(number: int, late_masks: tuple[int, ...] = (), masks: dict[int, np.ndarray] | None = None) -> tuple[str, Any]:
    ints, floats = np.zeros(1, np.int32), np.zeros(1)
    one = np.ones(1, np.int32)
    return "step", StepInput(
        number, ints, one, ints, ints, ints[None], one.astype(bool), floats, ints, ints, masks=masks or {},
        late_masks=late_masks,
    )  # fmt: skip


def masks(number: int, *rows: int) -> tuple[str, StepMasks]:
    return "masks", StepMasks(number, {row: MASK for row in rows})


def serve(monkeypatch: pytest.MonkeyPatch, messages: list[Any], make: Any) -> list[Any]:
    port = Port(messages)
    monkeypatch.setattr("multitensor.engine.rank_loop.find_factory", lambda name: lambda *parts: make(port.events))
    plan, config = make_plan(64, 16, 4), make_config(4, 16, 4)
    serve_rank("fake:fake", plan, 0, config, SingleGroup(), torch.device("cpu"), port)
    return port.events[1:]


MESSAGES = [step(0), step(1, (0, 1)), masks(1, 1), step(2), ("stop",)]


def test_the_forward_pass_comes_before_the_answer_that_masks_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve(monkeypatch, MESSAGES, lambda events: Device(events, quick=False)) == [
        ("forward", 0),
        ("sample", 0, []),
        ("forward", 1),
        ("answer", 0),
        ("sample", 1, [1]),
        ("forward", 2),
        ("sample", 2, []),
        ("answer", 1),
        ("answer", 2),
        "closed",
    ]


def test_a_step_that_is_over_is_answered_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    events = serve(monkeypatch, MESSAGES, lambda events: Device(events, quick=True))
    assert [event for event in events if event[0] in ("forward", "answer")] == [
        (kind, number) for number in range(3) for kind in ("forward", "answer")
    ]


def test_seconds_are_told_with_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Timed(Device):
        def __init__(self, events: list[Any]) -> None:
            super().__init__(events, quick=True)
            self.clock = SimpleNamespace(compute=2.0, reduction=None)

    events = serve(monkeypatch, [step(0), ("stop",)], Timed)
    assert events[-3:] == [("seconds", 2.0, None), ("answer", 0), "closed"]


def test_a_runner_of_one_call_gets_all_masks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [step(0, (1,), {0: MASK}), masks(0, 1), ("stop",)]
    assert serve(monkeypatch, messages, Simple) == [("step", 0, [0, 1], ()), ("answer", 0), "closed"]


@pytest.mark.parametrize("make", [Simple, lambda events: Device(events, quick=False)])
def test_a_rank_that_waits_for_masks_can_be_stopped(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    events = serve(monkeypatch, [step(0, (0,)), ("stop",)], make)
    assert events[-1] == "closed" and ("answer", 0) not in events


@pytest.mark.parametrize("wrong", [masks(7, 0), step(1), ("call", "memory", {})])
def test_anything_else_than_the_masks_is_a_fault(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    with pytest.raises(RuntimeError, match="masks of step 0"):
        serve(monkeypatch, [step(0, (0,)), wrong, ("stop",)], lambda events: Device(events, quick=True))
