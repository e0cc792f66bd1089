"""Notices ranks that neither answer nor end, because they are stopped or hang in a driver (never imports torch)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from multitensor.engine.bootstrap import Failure
from multitensor.errors import InputError
from multitensor.parallel.futex import Check

# Seconds that a step may take unless the user says otherwise. CPUs may need minutes for a large model: theirs are for
# CPU_TOKENS in a step and CPU_BYTES of weights at most, and longer for more.
DEFAULT_SECONDS = {"cpu": 600.0, "cuda": 120.0}
CPU_TOKENS = 512
CPU_BYTES = 20e9
_LONGEST_LOOK = 1.0
_STATES = {"T": "is stopped", "t": "is stopped by a debugger", "D": "hangs in the kernel", "Z": "has ended"}


def step_seconds(asked: float | None, kind: str, tokens: int = 0, weight_bytes: int = 0) -> float:
    """The limit for ranks on devices of that kind, with so many tokens in a step and bytes of weights in all; 0: none.
    Raises InputError."""
    if asked is None:
        more = max(1.0, tokens / CPU_TOKENS) * max(1.0, weight_bytes / CPU_BYTES) if kind == "cpu" else 1.0
        return DEFAULT_SECONDS.get(kind, 0.0) * more
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not 0 <= asked < float("inf"):
        raise InputError(f"step_timeout must be seconds, or 0 for no limit, not {asked!r}")
    return float(asked)


class StepWatch:
    """The check of one wait for the ranks: runs `check`, and calls `late` once `limit` seconds have passed (0: never).

    It must be called every second or so. Longer gaps count as a second: this process was stopped itself, or the
    machine paused, and the ranks were too.
    """

    def __init__(self, limit: float, check: Check, late: Callable[[], NoReturn]) -> None:
        self._limit, self._check, self._late = limit, check, late
        self._waited = 0.0
        self._last = time.monotonic()

    def news(self) -> None:
        """The ranks have shown that they go on: time counts from here."""
        self._waited = 0.0

    def __call__(self) -> None:
        self._check()
        now = time.monotonic()
        self._waited += min(now - self._last, _LONGEST_LOOK)
        self._last = now
        if self._limit and self._waited > self._limit:
            self._late()


def describe_silence(
    silence: str, limit: float, names: Sequence[str], pids: Mapping[int, int], behind: Sequence[int]
) -> Failure:
    """Whose fault it is, as far as that can be seen from outside. silence: as "no answer to a step". names: device of
    each rank. pids: by rank, where known. behind: ranks that have not read what others have."""
    told = []
    for rank, name in enumerate(names):
        state = _STATES.get(_state(pids[rank]), "") if rank in pids else ""
        if not state and rank in behind:
            state = "has not taken it up"
        if state:
            process = f", process {pids[rank]}," if rank in pids else ""
            told.append(f"rank {rank} ({name}){process} {state}")
    which = "; ".join(told) or f"it is not known which of the {len(names)} ranks hangs"
    return Failure("RankFailed", f"{silence} within {limit:g} s: {which}")


def _state(pid: int) -> str:
    """The letter that the kernel has for what a process does; empty where it is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
