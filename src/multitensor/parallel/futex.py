"""Waiting for another process without burning a core: Linux futexes through libc's `syscall` (never imports torch).

A futex is a 32-bit word in shared memory. `wait` sleeps while the word holds a given value, `wake` wakes all sleepers;
both take the word's address, and neither is "private", since the word lies in memory that several processes map.
ctypes gives the interpreter lock back during the call, and a signal ends the sleep early, so Ctrl-C works.
(Linux man page futex(2); numbers from the kernel's system call tables.)
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable

_SYSCALL_NUMBERS = {"x86_64": 202, "amd64": 202, "aarch64": 98, "arm64": 98, "riscv64": 98, "ppc64le": 221}
_MACHINE = platform.machine().lower()
_NUMBER = _SYSCALL_NUMBERS.get(_MACHINE) if platform.system() == "Linux" else None
_WAIT, _WAKE, _ALL = 0, 1, 0x7FFFFFFF
_HALF = 0x80000000

_LIBC = ctypes.CDLL(None, use_errno=False)
_SYSCALL = _LIBC.syscall
_SYSCALL.restype = ctypes.c_long
_SYSCALL.argtypes = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
]

# x86 makes one processor's stores visible in order, and loads in order too. Others do not; there a call that drops and
# takes the interpreter lock (an atomic release, then an acquire) keeps "data, then flag" in order on both sides.
STORES_IN_ORDER = _MACHINE in ("x86_64", "amd64")

Check = Callable[[], None]  # called while waiting; raises to end the wait


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def fence() -> None:
    """Orders the memory accesses before and after, where the processor does not do so by itself."""
    if not STORES_IN_ORDER:
        _LIBC.getppid()


def full_fence() -> None:
    """Makes this process's stores visible before its later loads, which no processor promises by itself: dropping and
    taking the interpreter lock around a foreign call are atomic read-modify-writes."""
    _LIBC.getppid()


def wake(address: int) -> None:
    """Wakes every sleeper on the word at `address`."""
    if _NUMBER is not None:
        _SYSCALL(_NUMBER, address, _WAKE, _ALL, None)


def wait(address: int, value: int, timeout: float) -> None:
    """Sleeps while the word at `address` holds `value`, at most `timeout` seconds; may return early for any reason."""
    if _NUMBER is None:  # no futex known here: poll
        time.sleep(min(timeout, 0.0002))
        return
    seconds = int(timeout)
    limit = _Timespec(seconds, int((timeout - seconds) * 1e9))
    _SYSCALL(_NUMBER, address, _WAIT, value, ctypes.addressof(limit))


def wait_reached(words: memoryview, index: int, address: int, target: int, spin: float, check: Check) -> None:
    """Returns once the counter words[index] (whose address is `address`) has reached `target`, modulo 2**32.

    words: format "I". Spins `spin` seconds, then sleeps; `check` runs whenever the sleep ends without news (at least
    every 50 ms), and what it raises goes to the caller.
    """
    if not (words[index] - target) & _HALF:
        fence()
        return
    if spin > 0.0:
        now = time.perf_counter
        deadline = now() + spin
        while now() < deadline:
            if not (words[index] - target) & _HALF:
                fence()
                return
    while True:
        value = words[index]
        if not (value - target) & _HALF:
            fence()
            return
        check()
        wait(address, value, 0.05)


def spin_seconds(ranks: int, cores: int) -> float:
    """How long a rank spins before it sleeps: 20 us where every rank has a core, not at all where they share (a
    spinning rank would keep the one it waits for from running)."""
    return 20e-6 if ranks <= cores else 0.0
