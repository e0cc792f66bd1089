"""What a launch asks of cuda.core, with one in its place that takes notes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from multitensor.kernels.cuda import program


@dataclass
class Notes:
    """configs: as they were made. starts: stream, configuration, kernel and arguments of each launch."""

    stream: int = 70
    configs: list[dict[str, Any]] = field(default_factory=list)
    starts: list[tuple[Any, ...]] = field(default_factory=list)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notes]:
    taken = Notes()

    def config(**values: Any) -> dict[str, Any]:
        taken.configs.append(values)
        return values

    class Stream:
        from_handle = staticmethod(lambda handle: f"stream {handle}")

    core = ModuleType("cuda.core")
    core.LaunchConfig, core.Stream = config, Stream  # type: ignore[attr-defined]
    core.launch = lambda *asked: taken.starts.append(asked)  # type: ignore[attr-defined]
    package = ModuleType("cuda")
    package.core = core  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: taken.stream + device, raising=False)
    made = (program._starter, program._config, program._stream, program._raw_stream)
    for each in made:
        each.cache_clear()
    yield taken
    for each in made:
        each.cache_clear()


def test_arguments_are_addresses_and_32_bits(notes: Notes) -> None:
    x = torch.zeros(8)
    program.launch("kernel", (4, 2), 128, 96, (x, x[2:], torch.empty(0), 7, -1, 1.5, True, np.int64(9)), overlap=True)
    ((stream, config, kernel, *arguments),) = notes.starts
    assert (stream, kernel) == ("stream 73", "kernel")
    assert config == {"grid": (4, 2), "block": 128, "shmem_size": 96, "programmatic_stream_serialization": True}
    assert arguments == [x.data_ptr(), x.data_ptr() + 8, 0, 7, -1, 1.5, 1, 9]
    assert [type(value) for value in arguments] == [int, int, int, *[np.int32] * 2, np.float32, *[np.int32] * 2]


def test_a_configuration_is_made_once_for_each_launch_that_differs(notes: Notes) -> None:
    kinds: list[tuple[Any, int, int, bool]] = [
        (4, 128, 0, False),
        (4, 128, 0, True),
        ((4, 1), 128, 0, False),
        (4, 256, 0, False),
        (4, 128, 32, False),
    ]
    for grid, block, shared, overlap in kinds * 2:
        program.launch("kernel", grid, block, shared, (), overlap=overlap)
    asked = [(c["grid"], c["block"], c["shmem_size"], c["programmatic_stream_serialization"]) for c in notes.configs]
    assert asked == kinds
    assert [start[1] for start in notes.starts] == notes.configs * 2


def test_threads_share_no_configuration(notes: Notes) -> None:
    """A launch writes into it, and lets other threads run meanwhile."""
    program.launch("kernel", 1, 32, 0, ())
    thread = threading.Thread(target=program.launch, args=("kernel", 1, 32, 0, ()))
    thread.start()
    thread.join()
    assert len(notes.configs) == 2
    assert notes.starts[0][1] is not notes.starts[1][1]


def test_a_launch_goes_to_the_stream_that_is_current_then(notes: Notes) -> None:
    program.launch("kernel", 1, 32, 0, ())
    notes.stream = 80
    program.launch("kernel", 1, 32, 0, ())
    assert [start[0] for start in notes.starts] == ["stream 73", "stream 83"]


def test_without_bare_numbers_torch_is_asked_for_its_stream(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Current:
        cuda_stream = 5

    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    monkeypatch.setattr(torch.cuda, "current_stream", Current)
    program.launch("kernel", 1, 32, 0, ())
    assert notes.starts[0][0] == "stream 5"


def test_a_number_beyond_32_bits_is_refused(notes: Notes) -> None:
    with pytest.raises(OverflowError):
        program.launch("kernel", 1, 32, 0, (1 << 31,))
    assert notes.starts == []
