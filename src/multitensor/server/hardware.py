"""What each device does right now: memory, load, power. NVML for GPUs, psutil for CPU ranks; only reads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from multitensor.sharding.topology import Device

MIN_SECONDS = 0.5  # readings younger than this are given again: many pages may look at once


@dataclass(frozen=True)
class Reading:
    """One device. Bytes of memory (all processes on a GPU; the whole machine for CPU ranks), load 0 to 1, power in W,
    degrees C; None where the device does not tell."""

    name: str
    memory_used: int | None = None
    memory_total: int | None = None
    load: float | None = None
    power: float | None = None
    temperature: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class HardwareReader:
    """Reads the devices of a plan. A device that cannot be asked has None everywhere; nothing here raises."""

    def __init__(self, devices: Sequence[Device], clock: Callable[[], float] = time.monotonic) -> None:
        self._devices = tuple(devices)
        self._clock = clock
        self._lock = threading.Lock()
        self._time = float("-inf")
        self._readings: tuple[Reading, ...] = ()
        self._nvml: Any = None
        self._handles: dict[str, Any] = {}
        if any(device.kind == "cuda" for device in self._devices):
            self._open_nvml()
        psutil.cpu_percent()  # the first call has nothing to compare with

    def read(self) -> tuple[Reading, ...]:
        """In rank order, at most MIN_SECONDS old."""
        with self._lock:
            now = self._clock()
            if now - self._time >= MIN_SECONDS:
                self._time = now
                load = psutil.cpu_percent() / 100
                memory = psutil.virtual_memory()
                host = (memory.total - memory.available, memory.total, load)
                self._readings = tuple(self._read(device, host) for device in self._devices)
            return self._readings

    def _read(self, device: Device, host: tuple[int, int, float]) -> Reading:
        if device.kind == "cpu":
            return Reading(device.name, *host)
        handle = self._handles.get(device.name)
        if handle is None:
            return Reading(device.name)
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        return Reading(
            device.name,
            None if memory is None else int(memory.used),
            None if memory is None else int(memory.total),
            None if rates is None else rates.gpu / 100,
            None if power is None else power / 1000,
            self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        )

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except self._nvml.NVMLError:  # not supported by this card, or the card fell off the bus
            return None

    def _open_nvml(self) -> None:
        import pynvml

        self._nvml = pynvml
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            for device in self._devices:
                if device.kind == "cuda":
                    self._handles[device.name] = (
                        pynvml.nvmlDeviceGetHandleByUUID(device.uuid)
                        if device.uuid
                        else pynvml.nvmlDeviceGetHandleByIndex(device.index)
                    )
