"""The thread that starts rank processes, watches them, and ends them (never imports torch).

All of a process's life happens in this one thread: PR_SET_PDEATHSIG, by which ranks die with the engine, counts the end
of the *thread* that started them as the parent's end, and a KeyboardInterrupt, which only meets the main thread, cannot
leave a half-started rank behind. Each rank holds one end of a socket pair: its failure report comes over it, its end is
seen by it whatever the cause, and the rank sees the engine's end the same way.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from multitensor.engine import torchrun
from multitensor.engine.bootstrap import Failure, rank_environment

_GRACE = 0.5  # seconds that ranks have to end by themselves after "stop"
_KILLED = 10.0  # seconds in which a killed process is gone, unless the kernel holds on to it
_LOG_BYTES = 8192
_MINE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What is to be started. names: device of each rank. fds: bootstrap, channel, and group or store, which the caller
    keeps open until the supervisor has ended. world: ranks 1.. come from torchrun instead of being started."""

    names: tuple[str, ...]
    fds: tuple[int, int, int]
    cpu_threads: int
    world: torchrun.World | None = None
    debug: bool = False


@dataclass
class _Rank:
    number: int
    control: socket.socket
    log: int  # read end of its stdout and stderr; -1: not captured
    process: subprocess.Popen[bytes] | None  # None: torchrun's child, not ours
    pid: int
    report: bytearray = field(default_factory=bytearray)
    printed: bytearray = field(default_factory=bytearray)
    ended: bool = False


class Supervisor(threading.Thread):
    """start() it, then ask `failure` now and then; stop() and join() at the end.

    on_failure runs in this thread as soon as a rank is lost, before the others are killed."""

    def __init__(self, launch: Launch, on_failure: Callable[[], None]) -> None:
        super().__init__(name="multitensor-supervisor", daemon=True)
        # Bound here, so that an engine that cannot have the name says so in its own thread.
        self._listener = torchrun.listen(launch.world) if launch.world else None
        self.failure: Failure | None = None
        self._launch = launch
        self._on_failure = on_failure
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._stopping = False
        self._failing = threading.Lock()

    def stop(self) -> None:
        """Asks for the end; ranks get a moment to leave by themselves, then are killed. Safe from any thread."""
        self._stopping = True
        self._wake()

    def accuse(self, failure: Failure) -> None:
        """The ranks count as lost from now on, though they live: they are killed. Safe from any thread."""
        self._fail(failure)
        self._wake()

    def pids(self) -> dict[int, int]:
        """By rank: its process, of those started so far."""
        return {rank.number: rank.pid for rank in self._ranks}

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def run(self) -> None:
        try:
            self._start_ranks()
            while self.failure is None and not self._stopping:
                self._watch(None)
                lost = [rank for rank in self._ranks if rank.ended]
                if lost and not self._stopping and self.failure is None:
                    self._fail(self._diagnose())
        except BaseException as error:
            self._fail(Failure("RankFailed", f"cannot start or watch the ranks: {type(error).__name__}: {error}"))
        finally:
            self._end_all()

    def _fail(self, failure: Failure) -> None:
        """Of several, the first is the cause."""
        with self._failing:
            if self.failure is None:
                self.failure = failure
        self._on_failure()

    # -- starting

    def _start_ranks(self) -> None:
        launch = self._launch
        if self._listener is not None:
            self._selector.register(self._listener, selectors.EVENT_READ)
        for number in range(1 if launch.world else len(launch.names)):
            if self._stopping:
                return
            self._add(self._spawn(number))

    def _spawn(self, number: int) -> _Rank:
        launch = self._launch
        ours, theirs = socket.socketpair()
        log_read, log_write = (-1, -1) if launch.debug else os.pipe()
        fds = (theirs.fileno(), *launch.fds)
        command = [sys.executable, "-P", "-m", "multitensor.engine.worker"]
        command += [str(value) for value in (number, os.getpid(), *fds)]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2 if launch.debug else log_write,
                stderr=None if launch.debug else log_write,
                pass_fds=fds,
                env=self._environment(),
                process_group=0,  # a terminal's Ctrl-C goes to the engine alone
            )
        except BaseException:
            ours.close()
            if log_read >= 0:
                os.close(log_read)
            raise
        finally:
            theirs.close()
            if log_write >= 0:
                os.close(log_write)
        return _Rank(number, ours, log_read, process, process.pid)

    def _environment(self) -> dict[str, str]:
        """The engine's, less torchrun's variables, and able to import what the engine can, installed or not."""
        environment = {k: v for k, v in os.environ.items() if k not in _MINE and not k.startswith("TORCHELASTIC_")}
        environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        return environment | rank_environment(environment, self._launch.cpu_threads)

    def _add(self, rank: _Rank) -> None:
        self._ranks.append(rank)
        rank.control.setblocking(False)
        self._selector.register(rank.control, selectors.EVENT_READ, rank)
        if rank.log >= 0:
            os.set_blocking(rank.log, False)
            self._selector.register(rank.log, selectors.EVENT_READ, rank)

    def _welcome(self) -> None:
        """One of torchrun's other processes knocks."""
        assert self._listener is not None
        log_read, log_write = os.pipe()
        try:
            guest = torchrun.welcome(self._listener, (*self._launch.fds, log_write))
        finally:
            os.close(log_write)
        expected = set(range(1, len(self._launch.names))) - {rank.number for rank in self._ranks}
        if guest is None or guest[1] not in expected:
            os.close(log_read)
            if guest is not None:
                guest[0].close()
            return
        connection, number, pid = guest
        self._add(_Rank(number, connection, log_read, None, pid))

    # -- watching

    def _watch(self, timeout: float | None) -> None:
        """Takes in whatever there is to hear, waiting up to `timeout` seconds for the first of it."""
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._woken:
                self._woken.recv(64)
            elif key.fileobj is self._listener:
                self._welcome()
            elif key.fileobj is key.data.control:
                self._hear_report(key.data)
            else:
                self._hear_log(key.data)

    def _hear_report(self, rank: _Rank) -> None:
        try:
            data = rank.control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        rank.report += data
        if not data:
            rank.ended = True
            self._selector.unregister(rank.control)

    def _hear_log(self, rank: _Rank) -> None:
        try:
            data = os.read(rank.log, 65536)
        except BlockingIOError:
            return
        rank.printed += data
        del rank.printed[:-_LOG_BYTES]
        if not data:
            self._selector.unregister(rank.log)
            os.close(rank.log)
            rank.log = -1

    def _diagnose(self) -> Failure:
        """Why ranks are lost. The cause is looked for a moment longer than a consequence is believed."""
        deadline = time.monotonic() + _GRACE
        while True:
            self._watch(0.0)
            failures = [self._failure_of(rank) for rank in self._ranks if rank.ended]
            causes = [failure for failure in failures if not failure.secondary]
            if causes:
                return causes[0]
            if time.monotonic() > deadline:
                return failures[0]
            self._watch(0.02)

    def _failure_of(self, rank: _Rank) -> Failure:
        reported = Failure.from_bytes(bytes(rank.report))
        if reported is not None:
            return reported
        who = f"rank {rank.number} ({self._launch.names[rank.number]})"
        if rank.process is None:
            return Failure("RankFailed", f"{who}, process {rank.pid}, ended without a word{self._last_words(rank)}")
        try:
            status = rank.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return Failure("RankFailed", f"{who} left the engine, but its process goes on")
        if status < 0:
            return Failure("RankFailed", f"{who} was killed by {_signal_name(-status)}{self._last_words(rank)}")
        return Failure("RankFailed", f"{who} ended with exit status {status}{self._last_words(rank)}")

    def _last_words(self, rank: _Rank) -> str:
        if rank.log >= 0:
            self._hear_log(rank)
        lines = rank.printed.decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:300]}" if lines else ""

    # -- ending

    def abandon(self) -> None:
        """Gives back what a supervisor holds that was never started."""
        self._end_all()

    def _end_all(self) -> None:
        """Leaves no process, no zombie and no descriptor of a rank, but for a process that hangs in the kernel: it ends
        when the kernel lets go of it."""
        deadline = time.monotonic() + (_GRACE if self.failure is None else 0.0)
        while time.monotonic() < deadline and any(not rank.ended for rank in self._ranks):
            self._watch(max(0.0, deadline - time.monotonic()))
        for rank in self._ranks:
            # Its process's end closes the socket, but the reverse need not be so: ours are killed in any case.
            if rank.process is not None:
                rank.process.kill()
            elif not rank.ended:
                with contextlib.suppress(OSError):
                    os.kill(rank.pid, signal.SIGKILL)
        deadline = time.monotonic() + _KILLED
        for rank in self._ranks:
            if rank.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    rank.process.wait(max(0.0, deadline - time.monotonic()))
            rank.control.close()
            if rank.log >= 0:
                os.close(rank.log)
                rank.log = -1
        if self._listener is not None:
            self._listener.close()
        self._selector.close()
        self._woken.close()
        self._waker.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
