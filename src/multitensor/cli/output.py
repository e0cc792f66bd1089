"""What all commands share: consoles, sizes in words, the progress bar of loading, one-line errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from multitensor.errors import MultitensorError


def stderr_console() -> Console:
    """Talk for people goes to stderr, so that stdout holds only what was asked for."""
    return Console(stderr=True, highlight=False)


def fail(error: MultitensorError) -> NoReturn:
    """One line, then the error's exit code."""
    line = " ".join(str(error).split())
    sys.stderr.write(f"multitensor: {line}\n")
    sys.exit(error.exit_code)


def warn(message: str) -> None:
    sys.stderr.write(f"multitensor: warning: {message}\n")


def warn_of(warnings: Iterable[str | None]) -> None:
    """A line for each that there is."""
    for warning in warnings:
        if warning is not None:
            warn(warning)


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


@contextmanager
def loading_bar(quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar over bytes loaded, on stderr when it is a terminal; None when there is nobody to watch."""
    console = stderr_console()
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("loading"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("load", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
