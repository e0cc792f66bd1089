"""Every error that a user can cause or meet, each with the exit code that the command line gives it.

Layer 0. Messages are one line: what was wrong, where, and what to do.
"""

from __future__ import annotations


class MultitensorError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 1


class InputError(MultitensorError, ValueError):
    """The user's input is wrong: a bad file, an unknown option value, a ratio of the wrong length."""

    exit_code = 2


class DoesNotFit(MultitensorError):
    """The model, or the context asked for, needs more memory than the devices have."""

    exit_code = 3


class CheckFailed(MultitensorError):
    """A check ran to its end and found a difference beyond tolerance."""

    exit_code = 1


class RankFailed(MultitensorError):
    """A tensor parallel rank raised, was killed, or stopped answering; the message carries its reason."""

    exit_code = 1


class Overloaded(MultitensorError):
    """The engine takes no request now: too many wait. Ask again later."""

    exit_code = 1


class ShuttingDown(MultitensorError):
    """The engine is stopping: it takes no more requests, and ends those under way."""

    exit_code = 1
