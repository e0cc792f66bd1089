"""What every rank does, thread or process: make the runner, load, then serve the engine's messages.

Messages: ("step", StepInput), ("masks", StepMasks) right after a step with late masks, ("call", method, arguments),
("stop",). Answers: ("ready",) once, then ("step", StepOutput) from rank 0 alone and ("call", value) from all. Imported
by ranks only: it imports torch.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from multitensor.config import EngineConfig
from multitensor.engine.batch import StepInput, StepOutput
from multitensor.engine.executor import Progress
from multitensor.engine.rank_clock import RankClock
from multitensor.parallel.group import Group
from multitensor.sharding.plan import Plan
from multitensor.sharding.topology import Device

_POLL_SECONDS = 20e-6


class Runner(Protocol):
    """What `Bootstrap.factory` makes; any further method may be the target of a call."""

    def load(self, progress: Progress | None = None) -> None: ...
    def step(self, step: StepInput) -> StepOutput: ...
    def close(self) -> None: ...


@runtime_checkable
class OverlappingRunner(Protocol):
    """A runner whose device works on by itself: `forward` queues a step as far as nothing has to be known that comes
    late, `sample` the rest; both return at once. `is_done` asks, `finish` waits. A step is sampled before the next
    one's forward; steps finish in order, and no collective happens in `finish`."""

    def forward(self, step: StepInput) -> Any: ...
    def sample(self, forwarded: Any, late_masks: Mapping[int, np.ndarray]) -> Any: ...
    def is_done(self, begun: Any) -> bool: ...
    def finish(self, begun: Any) -> StepOutput: ...


@runtime_checkable
class TimedRunner(Protocol):
    """A runner that knows where its time in steps went."""

    clock: RankClock


class RankPort(Protocol):
    """A rank's end of the channel to the engine."""

    def receive(self) -> Any: ...
    def pending(self) -> bool: ...
    def send(self, result: object) -> None: ...
    def report_progress(self, done: int, total: int) -> None: ...
    def report_seconds(self, compute: float, reduction: float | None) -> None: ...


def make_model_runner(plan: Plan, rank: int, config: EngineConfig, group: Group, device: torch.device) -> Runner:
    """The real thing."""
    from multitensor.engine.runner import ModelRunner
    from multitensor.formats.checkpoint import open_checkpoint

    return ModelRunner(open_checkpoint(config.model), plan, rank, config, group, device)


def find_factory(name: str) -> Any:
    """The callable that "module:callable" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def serve_rank(
    factory: str, plan: Plan, rank: int, config: EngineConfig, group: Group, device: torch.device, port: RankPort
) -> None:
    """Returns when the engine says stop. Whatever the runner raises goes to the caller: after it the ranks are out of
    step with each other, and all have to end."""
    runner: Runner = find_factory(factory)(plan, rank, config, group, device)
    runner.load(port.report_progress)
    port.send(("ready",))
    steps = _Steps(runner, port, reports=rank == 0)
    while True:
        message = steps.next_message()
        if message[0] == "step":
            steps.take(message[1])
            continue
        steps.flush()
        if message[0] == "call":
            port.send(("call", getattr(runner, message[1])(**message[2])))
        else:
            runner.close()
            return


class _Steps:
    """Begins the next step as soon as it is known and answers the one before when the device is done with it, so that
    the device never waits for the host."""

    def __init__(self, runner: Runner, port: RankPort, *, reports: bool) -> None:
        self._runner, self._port, self._reports = runner, port, reports
        self._overlapping = runner if isinstance(runner, OverlappingRunner) else None
        self._clock = runner.clock if isinstance(runner, TimedRunner) else None
        self._begun: Any = None
        self._unread: Any = None

    def next_message(self) -> Any:
        """The engine's next message; a step that becomes ready meanwhile is answered first."""
        if self._unread is not None:
            return self._unread
        while self._begun is not None and not self._port.pending():
            if self._overlapping is None or self._overlapping.is_done(self._begun):
                self.flush()
            else:
                time.sleep(_POLL_SECONDS)
        return self._port.receive()

    def take(self, step: StepInput) -> None:
        if self._overlapping is None:
            masks = self._late_masks(step)
            if masks is not None:
                self._answer(self._runner.step(replace(step, masks={**step.masks, **masks}, late_masks=())))
            return
        forwarded = self._overlapping.forward(step)
        if step.late_masks:
            self.flush()  # the masks depend on it
        masks = self._late_masks(step)
        if masks is None:
            return
        begun = self._overlapping.sample(forwarded, masks)
        self.flush()
        self._begun = begun
        if self._overlapping.is_done(begun):  # a CPU is, always: the engine need not wait for the next step's forward
            self.flush()

    def _late_masks(self, step: StepInput) -> Mapping[int, np.ndarray] | None:
        """What is still to be known of the step's grammars; None when the engine says stop instead."""
        if not step.late_masks:
            return {}
        message = self._port.receive()
        if message[0] == "stop":
            self._unread = message
            return None
        if message[0] != "masks" or message[1].step != step.step:
            raise RuntimeError(f"the masks of step {step.step} were expected, not {message[0]!r}")
        masks: Mapping[int, np.ndarray] = message[1].masks
        return masks

    def flush(self) -> None:
        if self._begun is not None and self._overlapping is not None:
            output = self._overlapping.finish(self._begun)
            self._begun = None
            self._answer(output)

    def _answer(self, output: StepOutput) -> None:
        if self._clock is not None:
            self._port.report_seconds(self._clock.compute, self._clock.reduction)
        if self._reports:
            self._port.send(("step", output))


def torch_device(device: Device) -> torch.device:
    """torch's name for it. GPUs are looked up by UUID where it is known: CUDA_VISIBLE_DEVICES renumbers them."""
    if device.kind != "cuda":
        return torch.device("cpu")
    if device.uuid:
        wanted = device.uuid.removeprefix("GPU-").lower()
        for index in range(torch.cuda.device_count()):
            if str(getattr(torch.cuda.get_device_properties(index), "uuid", "")).lower() == wanted:
                return torch.device("cuda", index)
    return torch.device("cuda", device.index)
