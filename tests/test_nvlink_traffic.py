"""The benchmark's arithmetic on the driver's counters, read from a driver that is made up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "nvlink_traffic.py"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("nvlink_traffic", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Driver:
    """Two GPUs: one with three links, whose counters grow with every look, one without links."""

    NVML_SUCCESS = 0
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 138, 139

    def __init__(self, grows: int) -> None:
        self.grows, self.looks = grows, 0

    def nvmlInit(self) -> None:
        self.looks += 1

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetFieldValues(self, device: int, fields: list[tuple[int, int]]) -> list[Any]:
        return [
            SimpleNamespace(
                nvmlReturn=0 if device == 0 and link < 3 else 3,
                value=SimpleNamespace(ullVal=1000 * field + link + self.grows * self.looks * (field - 137)),
            )
            for field, link in fields
        ]


@pytest.mark.parametrize(("grows", "status"), [(0, 0), (5, 3)])
def test_what_moved(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], grows: int, status: int
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver(grows))
    monkeypatch.setattr(sys, "argv", ["nvlink_traffic.py", "--still", "--", sys.executable, "-c", ""])
    assert script.main() == status
    told = capsys.readouterr().out
    sent, received = 3 * grows, 6 * grows
    assert told == f'{{"status": 0, "kib": {{"0": {{"sent": {sent}, "received": {received}}}, "1": null}}}}\n'


def test_a_command_that_fails(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver(0))
    monkeypatch.setattr(sys, "argv", ["nvlink_traffic.py", "--", sys.executable, "-c", "raise SystemExit(4)"])
    assert script.main() == 1
