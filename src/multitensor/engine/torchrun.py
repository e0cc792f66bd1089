"""Ranks that torchrun started: how they find the engine, which is rank 0's process (never imports torch).

The engine listens on an abstract Unix socket whose name only this torchrun launch has: it vanishes with the engine, and
no key of an earlier attempt can be left in a store. Each of the other processes connects, says its rank, and is handed
the file descriptors that a child would have inherited. The connection stays: its end tells either side of the other's.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from multitensor.errors import InputError, RankFailed

_HELLO = struct.Struct("<i")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid (Linux man page unix(7), SO_PEERCRED)
_FDS = 4
_PATIENCE = 120.0  # seconds to wait for an engine when something else than torchrun started the processes


@dataclass(frozen=True)
class World:
    """This process's place among those of one torchrun launch on this machine."""

    rank: int
    size: int
    socket_name: str


def torchrun_world(environ: Mapping[str, str]) -> World | None:
    """None outside torchrun, or when it started one process. Raises InputError for several hosts."""
    if not environ.get("WORLD_SIZE", "").isdigit() or not environ.get("RANK", "").isdigit():
        return None
    size, rank = int(environ["WORLD_SIZE"]), int(environ["RANK"])
    if size <= 1:
        return None
    local = environ.get("LOCAL_WORLD_SIZE", str(size))
    if local != str(size):
        raise InputError(f"torchrun started {size} processes, {local} of them here: only one host is supported yet")
    launch = [environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    # Unix socket names end at 107 bytes; the port alone tells launches of one moment apart.
    return World(rank, size, f"\0multitensor-{os.getuid()}-{'-'.join(launch)}"[:100])


def listen(world: World) -> socket.socket:
    """The engine's side: where the other ranks will knock."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(world.socket_name)
        listener.listen(world.size)
    except OSError as error:
        listener.close()
        raise RankFailed(
            f"cannot listen for torchrun's other ranks ({error}); one engine a launch is possible"
        ) from None
    return listener


def welcome(listener: socket.socket, fds: tuple[int, ...]) -> tuple[socket.socket, int, int] | None:
    """Accepts one knock and hands over `fds` (bootstrap, channel, group or store, log). (connection, rank, pid), or
    None if it was nobody of ours."""
    connection, _ = listener.accept()
    connection.settimeout(5.0)
    try:
        pid, uid = _peer(connection)
        hello = connection.recv(_HELLO.size)
        if uid == os.getuid() and len(hello) == _HELLO.size:
            socket.send_fds(connection, [b"!"], list(fds))
            connection.settimeout(None)
            return connection, _HELLO.unpack(hello)[0], pid
    except OSError:
        pass
    connection.close()
    return None


def knock(world: World) -> tuple[socket.socket, list[int]] | None:
    """A rank's side: waits for the engine. (connection, file descriptors), or None when rank 0's process ended without
    ever starting an engine (after `--help`, say, or an error, which it has printed itself)."""
    engine = _find_rank_zero()
    if engine is None and "TORCHELASTIC_RUN_ID" in os.environ:
        return None  # torchrun starts rank 0 first, so it has ended already
    launcher = os.getppid()
    patience = time.monotonic() + _PATIENCE
    while os.getppid() == launcher and (_is_running(engine) if engine else time.monotonic() < patience):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(world.socket_name)
            if _peer(connection)[1] != os.getuid():  # what the engine sends is unpickled: only our own user's will do
                raise OSError("another user listens there")
            connection.sendall(_HELLO.pack(world.rank))
            _, fds, _, _ = socket.recv_fds(connection, 1, _FDS)
            if len(fds) == _FDS:
                return connection, fds
            for fd in fds:
                os.close(fd)
        except OSError:
            pass
        connection.close()
        time.sleep(0.05)
    return None


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid


def _find_rank_zero() -> tuple[int, str] | None:
    """(pid, start time) of rank 0's process, or of the wrapper script around it: the launcher's child with RANK=0."""
    launcher = os.getppid()
    while any(entry.startswith(b"TORCHELASTIC_RUN_ID=") for entry in _environment(launcher)):  # a wrapper around us
        launcher = int(_stat(launcher)[1])
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = _stat(int(entry.name))
            except OSError:
                continue
            if int(fields[1]) == launcher and b"RANK=0" in _environment(int(entry.name)):
                return int(entry.name), fields[19]
    return None


def _environment(pid: int) -> list[bytes]:
    """What the process was started with; nothing for one that has ended or is another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on: state, parent, ..., start time at 19 (man page proc_pid_stat(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _is_running(process: tuple[int, str]) -> bool:
    try:
        fields = _stat(process[0])
        return fields[19] == process[1] and fields[0] not in "ZX"
    except (OSError, IndexError):
        return False
