"""What every rank does, thread or process: make the runner, load, then serve the engine's messages.

Messages: ("step", StepInput), ("call", method, arguments), ("stop",). Answers: ("ready",) once, then
("step", StepOutput) from rank 0 alone and ("call", value) from all. Imported by ranks only: it imports torch.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch

from multitensor.config import EngineConfig
from multitensor.engine.batch import StepInput, StepOutput
from multitensor.engine.executor import Progress
from multitensor.parallel.group import Group
from multitensor.sharding.plan import Plan
from multitensor.sharding.topology import Device


class Runner(Protocol):
    """What `Bootstrap.factory` makes; any further method may be the target of a call."""

    def load(self, progress: Progress | None = None) -> None: ...
    def step(self, step: StepInput) -> StepOutput: ...
    def close(self) -> None: ...


class RankPort(Protocol):
    """A rank's end of the channel to the engine."""

    def receive(self) -> Any: ...
    def send(self, result: object) -> None: ...
    def report_progress(self, done: int, total: int) -> None: ...


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
    while True:
        message = port.receive()
        if message[0] == "step":
            output = runner.step(message[1])
            if rank == 0:
                port.send(("step", output))
        elif message[0] == "call":
            port.send(("call", getattr(runner, message[1])(**message[2])))
        else:
            runner.close()
            return


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
