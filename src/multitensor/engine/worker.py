"""One rank in a process of its own, started by the engine, or one that torchrun started.

`python -m multitensor.engine.worker RANK ENGINE_PID CONTROL BOOTSTRAP CHANNEL GROUP`, the last four being numbers of
inherited file descriptors.

torch is imported only after the process is safe: bound to the engine's life and deaf to Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
from typing import TYPE_CHECKING, NoReturn

from multitensor.engine.bootstrap import Bootstrap, describe_failure, device_kind, rank_environment
from multitensor.engine.torchrun import knock, torchrun_world
from multitensor.errors import MultitensorError
from multitensor.parallel.group_region import abort_group
from multitensor.parallel.shared_region import SharedRegion
from multitensor.parallel.step_channel import RankChannel
from multitensor.sharding.memory import device_memory

if TYPE_CHECKING:
    import torch

    from multitensor.parallel.group import Group

_PR_SET_PDEATHSIG = 1  # Linux man page PR_SET_PDEATHSIG(2const)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h, mallopt(3)
_LARGE_BYTES, _KEPT_BYTES = 4 << 20, 64 << 20


def main() -> NoReturn:
    """Entry point of a rank that the engine started."""
    rank, engine, control, bootstrap, channel, group = (int(value) for value in sys.argv[1:7])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != engine:  # it died before the line above
        os._exit(1)
    for fd in (control, bootstrap, channel, group):
        os.set_inheritable(fd, False)
    _run(rank, socket.socket(fileno=control), bootstrap, channel, group)


def join_torchrun() -> NoReturn:
    """For processes with RANK >= 1 under torchrun: becomes that rank of the engine in rank 0's process. Exits with 0
    when the engine says stop, or when rank 0's process ends without having started one."""
    try:
        world = torchrun_world(os.environ)
        if world is None or world.rank == 0:
            raise RuntimeError("join_torchrun() is for the processes of rank 1 and above that torchrun starts")
    except MultitensorError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    met = knock(world)
    if met is None:
        sys.exit(0)
    connection, (bootstrap, channel, group, log) = met
    sys.stdout.flush()
    sys.stderr.flush()
    if not os.environ.get("MULTITENSOR_DEBUG"):
        os.dup2(log, 1)
        os.dup2(log, 2)
    os.close(log)
    _run(world.rank, connection, bootstrap, channel, group)


def _run(rank: int, control: socket.socket, bootstrap_fd: int, channel_fd: int, group_fd: int) -> NoReturn:
    """Serves until the engine says stop. On failure: first the report, then the others are told to stop waiting, so
    that the engine reads the cause before its consequences."""
    threading.Thread(target=_end_with_engine, args=(control,), daemon=True).start()
    device_name, debug, cpu_group = "?", False, False
    try:
        bootstrap = Bootstrap.from_memfd(bootstrap_fd)
        os.close(bootstrap_fd)
        plan, debug = bootstrap.plan, bootstrap.debug
        device_name = plan.ranks[rank].device.name
        cpu_group = plan.size > 1 and device_kind(plan) == "cpu"
        os.environ.update(rank_environment(os.environ, bootstrap.cpu_threads))
        port = RankChannel(SharedRegion(channel_fd), rank)
        _serve(bootstrap, rank, group_fd, port)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        with contextlib.suppress(OSError):
            control.sendall(describe_failure(error, rank, device_name).to_bytes())
            control.shutdown(socket.SHUT_WR)
        if cpu_group:
            abort_group(SharedRegion(os.dup(group_fd)))
        _leave(1)
    _leave(0)


def _serve(bootstrap: Bootstrap, rank: int, group_fd: int, port: RankChannel) -> None:
    from multitensor.engine.rank_loop import serve_rank

    plan = bootstrap.plan
    device = _prepare_device(bootstrap, rank)
    group = _make_group(plan.size, rank, device, group_fd, bootstrap.config.p2p)
    serve_rank(bootstrap.factory, plan, rank, bootstrap.config, group, device, port)


def _prepare_device(bootstrap: Bootstrap, rank: int) -> torch.device:
    """Threads, the current CUDA device, and the cap on what torch may allocate there."""
    _return_large_memory()
    import torch

    from multitensor.engine.rank_loop import torch_device

    torch.set_num_threads(bootstrap.cpu_threads)
    declared = bootstrap.plan.ranks[rank].device
    device = torch_device(declared)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if declared.capacity_bytes < declared.total_bytes:
            # torch's allocator is not all that counts against a cap: these lie beside it.
            parts = device_memory(bootstrap.plan)[rank].buffer_parts
            beside = sum(parts.get(name, 0) for name in ("cuda_context", "nccl", "peer_memory"))
            room = declared.capacity_bytes - beside
            torch.cuda.set_per_process_memory_fraction(max(0, room) / declared.total_bytes, device)
    return device


def _return_large_memory() -> None:
    """Tensors of 4 MiB and more go back to the system when they are freed. By itself malloc raises that limit as it
    sees large blocks freed, and batches of ever other sizes then leave holes in its heap (docs/perf-log.md). Where the
    C library knows no such setting, nothing is changed."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _make_group(size: int, rank: int, device: torch.device, group_fd: int, p2p: bool | None) -> Group:
    from multitensor.parallel.group import SingleGroup

    if size == 1:
        return SingleGroup()
    if device.type == "cpu":
        from multitensor.parallel.shared_memory_group import SharedMemoryGroup

        return SharedMemoryGroup(SharedRegion(os.dup(group_fd)), rank)
    from multitensor.parallel.torch_group import make_torch_group

    return make_torch_group(rank, size, device, f"/proc/self/fd/{group_fd}", p2p=p2p)


def _end_with_engine(control: socket.socket) -> None:
    """The engine never writes to this socket: reading from it returns when the engine is gone."""
    with contextlib.suppress(OSError):
        while control.recv(64):
            pass
    os._exit(1)


def _leave(status: int) -> NoReturn:
    """Without the interpreter's and torch's clean-up, which take time, can wait for dead peers, and free nothing that
    the kernel does not free at once."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
