"""Ranks as processes: starts them, sends them steps, and turns their failures into exceptions (never imports torch)."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

from multitensor.config import EngineConfig
from multitensor.engine.batch import StepInput, StepMasks, StepOutput
from multitensor.engine.bootstrap import MODEL_RUNNER, Bootstrap, cpu_threads_per_rank, device_kind
from multitensor.engine.executor import Progress
from multitensor.engine.statistics import RankSeconds
from multitensor.engine.step_watch import StepWatch, describe_silence
from multitensor.engine.supervisor import Launch, Supervisor
from multitensor.engine.torchrun import World, torchrun_world
from multitensor.errors import InputError, RankFailed
from multitensor.parallel.group_region import abort_group, create_group_region
from multitensor.parallel.shared_region import SharedRegion
from multitensor.parallel.step_channel import EngineChannel
from multitensor.sharding.plan import Plan

QUICK_CALLS = frozenset({"memory", "reductions"})  # these only look: no longer than a step
LONG_CALLS = frozenset({"warm_up"})  # steps that compile kernels; others, as verify, take as long as they take
# How many times as long as a step loading may go without any progress, and a long call, and how long at least.
LONG_STEPS = 5
LONG_SECONDS = 300.0
NO_ANSWER = "no answer to a step"


class _Ranks:
    """Everything that has to be given back; knows nothing of the executor, so that dropping the executor ends the
    ranks."""

    def __init__(self, plan: Plan, config: EngineConfig, factory: str) -> None:
        kind = device_kind(plan)
        world = _world_for(plan)
        debug = bool(os.environ.get("MULTITENSOR_DEBUG"))
        threads = cpu_threads_per_rank(plan, os.environ)
        self.size = plan.size
        self._names = tuple(rank.device.name for rank in plan.ranks)
        self._step_seconds = config.step_timeout
        with contextlib.ExitStack() as undo:
            bootstrap = Bootstrap(plan, config, factory, threads, debug).to_memfd()
            undo.callback(os.close, bootstrap)
            self.channel = EngineChannel(plan.size)
            undo.callback(self.channel.close)
            # CPU ranks reduce in it; for GPU ranks it only holds their rendezvous, which has to start empty.
            self._group_region = create_group_region(plan.size) if kind == "cpu" else None
            if self._group_region is not None:
                undo.callback(self._group_region.close)
                group_fd = self._group_region.fd
            else:
                group_fd = os.memfd_create("multitensor-store", os.MFD_CLOEXEC)
                undo.callback(os.close, group_fd)
            launch = Launch(
                names=self._names,
                fds=(bootstrap, self.channel.region.fd, group_fd),
                cpu_threads=threads,
                world=world,
                debug=debug,
            )
            self.supervisor = Supervisor(launch, _give_up(self.channel, self._group_region))
            self._release = undo.pop_all()

    def check(self) -> None:
        """Raises what a rank failed of."""
        if self.supervisor.failure is not None:
            raise self.supervisor.failure.error()
        if not self.supervisor.is_alive():
            raise RankFailed("the ranks have been ended")

    def watch(self, silence: str, check: Callable[[], None] | None = None, *, long: bool = False) -> StepWatch:
        """The check of a wait for the ranks: after step_timeout seconds, or LONG_STEPS times as many, they are given
        up, and killed. silence: what there is not, as "no answer to a step". check: what else is to be done meanwhile,
        instead of `self.check`."""
        limit = self._step_seconds
        if long and limit:
            limit = max(LONG_SECONDS, LONG_STEPS * limit)

        def late() -> NoReturn:
            pids, behind = self.supervisor.pids(), self.channel.behind()
            failure = describe_silence(silence, limit, self._names, pids, behind)
            self.supervisor.accuse(failure)
            raise failure.error()

        return StepWatch(limit, check or self.check, late)

    def close(self) -> None:
        """Safe to call twice, and again after an interruption."""
        supervisor = self.supervisor
        if threading.current_thread() is supervisor:  # the garbage collector chose this thread to run the finalizer in
            threading.Thread(target=self.close, daemon=True).start()
            return
        if supervisor.is_alive() and supervisor.failure is None:
            supervisor.stop()
            with contextlib.suppress(_RingFull):
                self.channel.send(("stop",), _refuse)
        elif supervisor.ident is None:  # never started
            supervisor.abandon()
        if supervisor.is_alive():
            supervisor.join()
        self._release.close()


class _RingFull(Exception):
    pass


def _refuse() -> None:
    raise _RingFull


def _give_up(channel: EngineChannel, group_region: SharedRegion | None) -> Any:
    def give_up() -> None:
        channel.abort()
        if group_region is not None:
            abort_group(group_region)

    return give_up


def _world_for(plan: Plan) -> World | None:
    """Under torchrun its processes are the ranks, so their number has to be the plan's."""
    world = torchrun_world(os.environ)
    if world is None:
        return None
    if world.rank != 0:
        raise InputError(f"the engine runs in torchrun's rank 0, and this is rank {world.rank}: call join_torchrun()")
    if world.size != plan.size:
        raise InputError(f"torchrun started {world.size} processes and the plan has {plan.size} ranks; make them equal")
    return world


class ProcessExecutor:
    """Drives ranks that are processes of their own (`Executor`). Used by one thread at a time.

    factory: "module:callable" that makes each rank's runner; the model's unless a test says otherwise.
    """

    def __init__(self, factory: str = MODEL_RUNNER) -> None:
        self._factory = factory
        self._ranks: _Ranks | None = None
        self._finalizer: weakref.finalize[..., ProcessExecutor] | None = None
        self._waiting: deque[StepOutput] = deque()  # results that came while a call waited for its own

    def start(self, plan: Plan, config: EngineConfig, progress: Progress | None = None) -> None:
        """Raises InputError or DoesNotFit when that is what a rank failed of, else RankFailed; nothing is left then."""
        if self._ranks is not None:
            raise RuntimeError("this executor has been started before")
        ranks = self._ranks = _Ranks(plan, config, self._factory)
        self._finalizer = weakref.finalize(self, ranks.close)
        try:
            ranks.supervisor.start()
            self._wait_ready(ranks, progress)
        except BaseException:
            self.close()
            raise

    def _wait_ready(self, ranks: _Ranks, progress: Progress | None) -> None:
        last = (0, 0)

        def check() -> None:
            nonlocal last
            ranks.check()
            now = ranks.channel.progress()
            if now != last:
                last = now
                watch.news()
                if progress is not None:
                    progress(*now)

        watch = ranks.watch("no progress in loading", check, long=True)
        for rank in range(ranks.size):
            ranks.channel.receive(rank, watch)
        check()

    def _started(self) -> _Ranks:
        if self._ranks is None:
            raise RuntimeError("this executor has not been started")
        self._ranks.check()
        return self._ranks

    def check(self) -> None:
        self._started()

    def submit(self, step: StepInput) -> None:
        ranks = self._started()
        ranks.channel.send(("step", step), ranks.watch(NO_ANSWER, lambda: self._while_full(ranks)))

    def send_masks(self, masks: StepMasks) -> None:
        ranks = self._started()
        ranks.channel.send(("masks", masks), ranks.watch(NO_ANSWER, lambda: self._while_full(ranks)))

    def _while_full(self, ranks: _Ranks) -> None:
        """The ring of steps is full. Rank 0 may be waiting in turn for us to read its results."""
        ranks.check()
        while ranks.channel.pending(0):
            self._waiting.append(ranks.channel.receive(0, ranks.watch(NO_ANSWER))[1])

    def collect(self) -> StepOutput:
        """There must be a submitted step whose result has not been collected."""
        ranks = self._started()
        if self._waiting:
            return self._waiting.popleft()
        output: StepOutput = ranks.channel.receive(0, ranks.watch(NO_ANSWER))[1]
        return output

    def rank_seconds(self) -> RankSeconds:
        return self._started().channel.seconds()

    def call(self, method: str, **arguments: Any) -> list[Any]:
        ranks = self._started()
        ranks.channel.send(("call", method, arguments), ranks.watch(NO_ANSWER, lambda: self._while_full(ranks)))
        values = []
        for rank in range(ranks.size):
            long, watched = method in LONG_CALLS, method in QUICK_CALLS | LONG_CALLS
            check = ranks.watch(f"no answer to {method}", long=long) if watched else ranks.check
            kind, value = ranks.channel.receive(rank, check)
            while kind == "step":
                self._waiting.append(value)
                kind, value = ranks.channel.receive(rank, check)
            values.append(value)
        return values

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
