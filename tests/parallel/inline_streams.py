"""CUDA's streams, events and flags as far as large sums use them; all is done at once, by the calling thread."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from multitensor.errors import RankFailed
from multitensor.kernels.cuda import flags


class Event:
    """Tells the time at which it was recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        assert self.at is not None and later.at is not None
        return 1e3 * (later.at - self.at)


class Stream:
    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        self.device = device

    def wait_event(self, event: Event) -> None:
        assert event.at is not None, "waits for what nobody has recorded"


@contextlib.contextmanager
def entered(stream: Stream) -> Iterator[None]:
    yield


def launch(kernel: str, grid: int, block: int, shared: int, arguments: tuple[Any, ...]) -> None:
    """The kernels of flags.cu."""
    if kernel == "raise_flag":
        addresses, rank, value = arguments
        ctypes.c_int32.from_address(int(addresses[rank])).value = value
        return
    assert kernel == "await_flags"
    addresses, late, rank, ranks, value, limit_ms = arguments
    deadline = time.monotonic() + abs(limit_ms) / 1e3
    for other in (other for other in range(ranks) if other != rank):
        word = ctypes.c_int32.from_address(int(addresses[other]))
        while ctypes.c_int32(word.value - value).value < 0:
            if time.monotonic() > deadline:
                if limit_ms >= 0:
                    raise RankFailed("waited in vain")
                late += 1
                return
            time.sleep(1e-4)


class Program:
    def __init__(self, source: str, defines: dict[str, object], device: torch.device) -> None:
        assert source == "flags.cu"

    def kernel(self, name: str) -> str:
        return name


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "stream": entered,
        "current_stream": Stream,
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(flags, "Program", Program)
    monkeypatch.setattr(flags, "launch", launch)
