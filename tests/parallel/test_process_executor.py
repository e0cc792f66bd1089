"""Ranks as processes: start, steps, calls, every way to fail, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import psutil
import pytest
from rank_fakes import FACTORY, make_config, make_plan, make_step, wait_gone

from multitensor.engine import process_executor, step_watch, supervisor
from multitensor.engine.process_executor import ProcessExecutor
from multitensor.engine.step_watch import StepWatch
from multitensor.errors import DoesNotFit, InputError, MultitensorError, RankFailed

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No descriptor, child or zombie more than before."""
    gc.collect()
    descriptors, children = len(os.listdir("/proc/self/fd")), psutil.Process().children()
    yield
    gc.collect()
    assert [child for child in psutil.Process().children() if child not in children] == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def named_memory(pid: int) -> set[str]:
    """What a process maps from /dev/shm, as "inode path" (an unlinked name ends in "(deleted)")."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {" ".join(line.split(maxsplit=5)[4:]) for line in lines if "/dev/shm/" in line}


def shares_only_nameless_memory(pid: int, before: Set[str] = frozenset()) -> bool:
    """What a process maps from /dev/shm would outlive it; a memfd cannot. before: what it had mapped already, such as
    the semaphores of multiprocessing locks that other tests made."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return "/memfd:multitensor-" in maps and named_memory(pid) <= before


@pytest.fixture
def executor(nothing_left: None) -> Iterator[ProcessExecutor]:
    """Ended before `nothing_left` looks, also when the test's own assertions fail."""
    executor = ProcessExecutor(FACTORY)
    yield executor
    executor.close()


def start(executor: ProcessExecutor, size: int, behaviour: str = "") -> None:
    executor.start(make_plan(size), make_config(behaviour))


def test_steps_calls_progress_and_close(executor: ProcessExecutor) -> None:
    lock = multiprocessing.get_context("fork").Lock()  # maps a semaphore of /dev/shm, as tqdm's does in other tests
    before = named_memory(os.getpid())
    assert any("/dev/shm/sem." in name for name in before), lock
    progress: list[tuple[int, int]] = []
    executor.start(make_plan(2), make_config(), lambda done, total: progress.append((done, total)))
    assert progress[-1] == (201, 400)
    for number in range(4):
        executor.submit(make_step(number))
    outputs = [executor.collect() for _ in range(4)]
    assert [(output.step, output.token_ids.tolist()) for output in outputs] == [(n, [12]) for n in range(4)]
    executor.submit(make_step(4))
    assert executor.call("echo", value={"a": 1}) == [(0, {"a": 1}), (1, {"a": 1})]  # between steps
    assert executor.collect().step == 4
    assert executor.call("steps_seen") == [[0, 1, 2, 3, 4]] * 2
    assert executor.call("threads") == [max(1, _threads() // 2)] * 2
    large = os.urandom(6 << 20)
    assert executor.call("echo", value=large) == [(0, large), (1, large)]  # larger than the rings
    pids = executor.call("pid")
    assert len({os.getpid(), *pids}) == 3
    assert shares_only_nameless_memory(os.getpid(), before)
    assert all(shares_only_nameless_memory(pid) for pid in pids)
    begin = time.monotonic()
    executor.close()
    assert time.monotonic() - begin < 1.0
    assert wait_gone(pids, 0.0) == []
    executor.close()
    with pytest.raises(RankFailed, match="ended"):
        executor.submit(make_step(5))


def _threads() -> int:
    cores = len(os.sched_getaffinity(0))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, 2 * int(asked)) if asked.isdigit() else cores


def test_a_rank_killed_in_a_reduction_takes_all_down(executor: ProcessExecutor) -> None:
    start(executor, 2)
    pids = executor.call("pid")
    killed = []

    def kill() -> None:
        killed.append(time.monotonic())
        os.kill(pids[1], signal.SIGKILL)

    threading.Timer(0.2, kill).start()
    with pytest.raises(RankFailed, match=r"^rank 1 \(cpu:1\) was killed by SIGKILL"):
        executor.call("reduce_for_ever")
    assert time.monotonic() - killed[0] < 5.0
    assert wait_gone(pids, 2.0) == []
    with pytest.raises(RankFailed, match="SIGKILL"):
        executor.collect()


def test_an_exception_in_a_call_is_told_with_its_place(executor: ProcessExecutor) -> None:
    start(executor, 2)
    pids = executor.call("pid")
    with pytest.raises(
        RankFailed, match=r"^rank 1 \(cpu:1\) failed: ValueError: this rank has had enough \(rank_fakes.py:\d+\)$"
    ):
        executor.call("fail", rank=1)
    assert wait_gone(pids, 2.0) == []


@pytest.mark.parametrize(
    ("size", "behaviour", "kind", "message"),
    [
        (2, "input error", InputError, "^tensor blk.0.ffn_up.weight has an unknown type 99$"),
        (
            1,
            "out of memory",
            DoesNotFit,
            r"^rank 0 \(cpu:0\) ran out of memory \(cannot allocate 12 GiB\); take a smaller context",
        ),
        (1, "exit", RankFailed, r"^rank 0 \(cpu:0\) ended with exit status 7: the library says goodbye$"),
    ],
)
def test_a_failure_while_loading_keeps_its_type(
    executor: ProcessExecutor, size: int, behaviour: str, kind: type[MultitensorError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        start(executor, size, behaviour)
    assert type(caught.value) is kind


@pytest.mark.parametrize(("stopped", "what"), [(1, "a step"), (0, "a step"), (1, "memory")])
def test_a_stopped_rank_is_told_and_killed(executor: ProcessExecutor, stopped: int, what: str) -> None:
    """Longer calls than the limit go through meanwhile, and steps that follow each other, each shorter."""
    executor.start(make_plan(2), make_config(step_timeout=0.8))
    pids = executor.call("pid")
    executor.call("sleep", seconds=1.2)
    for number in range(3):
        executor.submit(make_step(number))
        assert executor.collect().step == number
        time.sleep(0.4)
    assert executor.call("memory") == [0, 1]
    os.kill(pids[stopped], signal.SIGSTOP)
    began = time.monotonic()
    told = rf"^no answer to {what} within 0.8 s: rank {stopped} \(cpu:{stopped}\), process {pids[stopped]}, is stopped$"
    with pytest.raises(RankFailed, match=told):
        if what == "a step":
            executor.submit(make_step(3))
            executor.collect()
        else:
            executor.call("memory")
    assert 0.8 < time.monotonic() - began < 2.8
    with pytest.raises(RankFailed, match="is stopped"):
        executor.check()
    assert wait_gone(pids, 2.0) == []


def test_a_rank_that_stops_while_loading_is_told(executor: ProcessExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_executor, "LONG_SECONDS", 4.0)
    with pytest.raises(RankFailed, match=r"^no progress in loading within 4 s: "):
        executor.start(make_plan(2), make_config("stop", step_timeout=0.5))


def test_a_rank_that_does_not_warm_up_is_told(executor: ProcessExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    executor.start(make_plan(1), make_config(step_timeout=0.1))
    monkeypatch.setattr(process_executor, "LONG_SECONDS", 1.0)
    with pytest.raises(RankFailed, match=r"^no answer to warm_up within 1 s: "):
        executor.call("warm_up")


@pytest.mark.parametrize("loaded", [[], [0, 10, 10, 20, 30, 30, 40, 50, 60, 70, 80]])
def test_ranks_may_load_as_long_as_they_get_on(loaded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks a second apart, of which three may bring no news."""
    clock = itertools.count()
    monkeypatch.setattr(step_watch.time, "monotonic", lambda: float(next(clock)))
    done, told = iter(loaded), []

    def late() -> NoReturn:
        raise RankFailed("late")

    def receive(rank: int, check: Callable[[], None]) -> None:
        for _ in range(10):
            check()

    ranks = SimpleNamespace(
        size=1,
        check=lambda: None,
        channel=SimpleNamespace(progress=lambda: (next(done, 0), 90), receive=receive),
        watch=lambda silence, check, long: StepWatch(3.0, check, late),
    )
    with contextlib.nullcontext() if loaded else pytest.raises(RankFailed, match="late"):
        ProcessExecutor()._wait_ready(ranks, lambda now, total: told.append(now))  # type: ignore[arg-type]
    assert told == sorted({0, *loaded})


def test_a_rank_that_no_kill_ends_does_not_hold_up_the_engine(
    executor: ProcessExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that hangs in a driver."""
    monkeypatch.setattr(supervisor, "_KILLED", 0.3)
    executor.start(make_plan(1), make_config(step_timeout=0.3))
    (pid,) = executor.call("pid")
    os.kill(pid, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "kill", lambda process: None)
        executor.submit(make_step(0))
        with pytest.raises(RankFailed, match="is stopped"):
            executor.collect()
        began = time.monotonic()
        executor.close()
        assert 0.1 < time.monotonic() - began < 2.0
    os.waitpid(pid, 0)  # the kernel's signal of the supervisor's end reaches this one


def test_dropping_the_executor_ends_its_ranks() -> None:
    executor = ProcessExecutor(FACTORY)
    start(executor, 1)
    pids = executor.call("pid")
    del executor
    gc.collect()
    assert wait_gone(pids, 2.0) == []


def test_plans_that_cannot_run_are_refused_at_once() -> None:
    with pytest.raises(InputError, match="only serve to plan"):
        ProcessExecutor(FACTORY).start(make_plan(2, "any"), make_config())
    with pytest.raises(RuntimeError):
        ProcessExecutor(FACTORY).submit(make_step(0))
    never_started = ProcessExecutor(FACTORY)
    never_started.close()


ENGINE = """
import sys
from multitensor.engine.process_executor import ProcessExecutor
from rank_fakes import FACTORY, make_config, make_plan
executor = ProcessExecutor(FACTORY)
print("starting", flush=True)
executor.start(make_plan(2), make_config(sys.argv[1]))
assert "torch" not in sys.modules
print(*executor.call("pid"), flush=True)
executor.call(sys.argv[2], **eval(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("behaviour", "call", "death"),
    [
        ("sleep", "", signal.SIGINT),  # Ctrl-C while loading
        ("", "sleep", signal.SIGINT),  # ranks that do not listen
        ("", "reduce_for_ever", signal.SIGKILL),
    ],
)
def test_the_engines_end_leaves_nothing(behaviour: str, call: str, death: signal.Signals) -> None:
    arguments = "{'seconds': 600}" if call == "sleep" else "{}"
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, behaviour, call, arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
    )
    try:
        assert engine.stdout is not None and engine.stderr is not None
        assert engine.stdout.readline() == "starting\n"
        if behaviour == "sleep":
            pids = _children(engine.pid, 2)
        else:
            pids = [int(pid) for pid in engine.stdout.readline().split()]
        assert len(pids) == 2 and wait_gone(pids, 0.0) == pids
        assert behaviour == "sleep" or all(shares_only_nameless_memory(pid) for pid in [engine.pid, *pids])
        time.sleep(0.2)
        begin = time.monotonic()
        engine.send_signal(death)
        engine.wait(timeout=5)
        assert wait_gone(pids, max(0.0, begin + 3 - time.monotonic())) == []
        errors = engine.stderr.read()
        assert errors.count("KeyboardInterrupt") == (1 if death == signal.SIGINT else 0), errors
    finally:
        engine.kill()
        engine.communicate()


def _children(pid: int, count: int) -> list[int]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [child.pid for child in psutil.Process(pid).children()]
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{pid} has not started {count} processes")
