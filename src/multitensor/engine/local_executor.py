"""Ranks as threads of this process: for tests, for debugging, and where processes cannot be had. CPU only."""

from __future__ import annotations

import queue
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from multitensor.config import EngineConfig
from multitensor.engine.batch import StepInput, StepMasks, StepOutput
from multitensor.engine.bootstrap import MODEL_RUNNER, Failure, describe_failure, device_kind
from multitensor.engine.executor import Progress
from multitensor.engine.statistics import RankSeconds
from multitensor.errors import InputError, RankFailed
from multitensor.sharding.plan import Plan

if TYPE_CHECKING:
    from multitensor.parallel.local_group import LocalGroup

_PATIENCE = 5.0  # seconds that a rank has to finish its step when the executor closes


class _Port:
    """A thread's end of the channel (`RankPort`)."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.loaded = (0, 0)
        self.seconds: tuple[float, float | None] = (0.0, None)

    def receive(self) -> Any:
        return self.messages.get()

    def pending(self) -> bool:
        return not self.messages.empty()

    def send(self, result: object) -> None:
        self.results.put(result)

    def report_progress(self, done: int, total: int) -> None:
        self.loaded = (done, total)

    def report_seconds(self, compute: float, reduction: float | None) -> None:
        self.seconds = compute, reduction


class LocalExecutor:
    """Drives ranks that are threads (`Executor`). A failure in a rank is raised with the rank's exception as its cause.

    factory: "module:callable" that makes each rank's runner; the model's unless a test says otherwise.
    """

    def __init__(self, factory: str = MODEL_RUNNER) -> None:
        self._factory = factory
        self._ports: list[_Port] = []
        self._threads: list[threading.Thread] = []
        self._groups: list[LocalGroup] = []
        self._failures: list[tuple[Failure, BaseException]] = []  # in the order in which they happened
        self._waiting: deque[StepOutput] = deque()

    def start(self, plan: Plan, config: EngineConfig, progress: Progress | None = None) -> None:
        if self._threads:
            raise RuntimeError("this executor has been started before")
        if device_kind(plan) != "cpu":
            raise InputError("ranks as threads run on the CPU only; use processes for GPUs")
        from multitensor.parallel.local_group import LocalGroup

        self._groups = LocalGroup.make(plan.size)
        self._ports = [_Port() for _ in range(plan.size)]
        self._threads = [
            threading.Thread(target=self._run, args=(plan, rank, config), name=f"rank-{rank}", daemon=True)
            for rank in range(plan.size)
        ]
        try:
            for thread in self._threads:
                thread.start()
            for port in self._ports:
                self._result(port, progress)
        except BaseException:
            self.close()
            raise

    def _run(self, plan: Plan, rank: int, config: EngineConfig) -> None:
        import torch

        from multitensor.engine.rank_loop import serve_rank
        from multitensor.parallel.group import Group, SingleGroup

        group: Group = self._groups[rank] if plan.size > 1 else SingleGroup()
        try:
            serve_rank(self._factory, plan, rank, config, group, torch.device("cpu"), self._ports[rank])
        except BaseException as error:
            failure = describe_failure(error, rank, plan.ranks[rank].device.name)
            self._failures.append((failure, error))
            group.abort(failure.message)

    def check(self) -> None:
        # The first is the cause: the others only fail once it has aborted the group, after it was noted.
        if self._failures:
            failure, cause = self._failures[0]
            raise failure.error() from cause
        if not self._threads:
            raise RankFailed("the ranks have been ended")

    def _result(self, port: _Port, progress: Progress | None = None) -> Any:
        while True:
            self.check()
            if progress is not None:
                progress(sum(p.loaded[0] for p in self._ports), sum(p.loaded[1] for p in self._ports))
            try:
                return port.results.get(timeout=0.05)
            except queue.Empty:
                continue

    def _send(self, message: object) -> None:
        self.check()
        for port in self._ports:
            port.messages.put(message)

    def submit(self, step: StepInput) -> None:
        self._send(("step", step))

    def send_masks(self, masks: StepMasks) -> None:
        self._send(("masks", masks))

    def collect(self) -> StepOutput:
        """There must be a submitted step whose result has not been collected."""
        if self._waiting:
            return self._waiting.popleft()
        output: StepOutput = self._result(self._ports[0])[1]
        return output

    def rank_seconds(self) -> RankSeconds:
        return tuple(port.seconds for port in self._ports)

    def call(self, method: str, **arguments: Any) -> list[Any]:
        self._send(("call", method, arguments))
        values = []
        for port in self._ports:
            kind, value = self._result(port)
            while kind == "step":
                self._waiting.append(value)
                kind, value = self._result(port)
            values.append(value)
        return values

    def close(self) -> None:
        """Threads cannot be killed: one that does not return from its step within seconds is left to end by itself."""
        threads, self._threads = self._threads, []
        for port in self._ports:
            port.messages.put(("stop",))
        for thread in threads:
            if thread.ident is not None:
                thread.join(timeout=0.0 if self._failures else _PATIENCE)
        for group in self._groups:
            group.abort("the ranks have been ended")
        for thread in threads:
            if thread.ident is not None:
                thread.join(timeout=_PATIENCE)
        self._groups = []
