"""Trying a way of summing that these GPUs may not be up to, before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multitensor.parallel.group import Group

TRIAL_MS = 2000  # for a kernel to wait while it is only tried: after that the way is given up, not the process
NO_ANSWER = f"no answer within {TRIAL_MS / 1000:g} s"


def first_reason(group: Group, trial: Callable[[], str | None]) -> str | None:
    """Collective: what is wrong by the first rank that found anything; None where all is well."""
    for rank, reason in enumerate(group.gather_objects(trial())):
        if reason is not None:
            return f"through host memory rank {rank} got {reason}"
    return None


def failure_of(work: Callable[[], object]) -> str | None:
    """What goes wrong in work that needs no other rank, in one line; None: nothing."""
    try:
        work()
    except Exception as error:  # of whatever kind the compiler's and the driver's are
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None
