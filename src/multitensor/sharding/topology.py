"""The devices a plan cuts over: GPUs through NVML, AMD's through the kernel's files, CPU ranks from this machine's
memory (never imports torch)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitensor.config import DeviceRequest
from multitensor.errors import InputError
from multitensor.sharding.amd_gpus import find_amd_gpus

MAX_RANKS = 64


@dataclass(frozen=True)
class Device:
    """name: "cuda:0", "cpu:1" or "device:0" for a planned one; capacity_bytes: what the engine may use of it
    (a cap, or the free memory measured); total_bytes: what it has.

    uuid: a GPU's, as NVML and CUDA both print it ("GPU-..."); "" for others. NVML counts GPUs by PCI bus, as CUDA does
    when CUDA_DEVICE_ORDER=PCI_BUS_ID is set.
    """

    name: str
    kind: str  # "cpu", "cuda" or "any"
    index: int
    capacity_bytes: int
    total_bytes: int
    description: str = ""
    uuid: str = ""


def find_devices(
    requests: Sequence[DeviceRequest] | None = None, tensor_parallel_size: int | None = None
) -> tuple[Device, ...]:
    """One device a rank: those asked for; else the first `tensor_parallel_size` GPUs, or that many CPU ranks on a
    machine without a GPU; else every GPU, or one CPU rank. Raises InputError for what does not exist."""
    if requests:
        return _requested(tuple(requests), tensor_parallel_size)
    if tensor_parallel_size is not None and not 1 <= tensor_parallel_size <= MAX_RANKS:
        raise InputError(f"{tensor_parallel_size} tensor parallel ranks: between 1 and {MAX_RANKS} ranks are possible")
    gpus = find_gpus()
    wanted = tensor_parallel_size or len(gpus) or 1
    if not gpus:
        return _cpu_ranks([DeviceRequest("cpu", i) for i in range(wanted)])
    if wanted > len(gpus):
        raise InputError(
            f"{wanted} tensor parallel ranks: this machine has {_list(gpus)}; ask for fewer, or for CPU ranks with "
            f"devices cpu:{wanted}"
        )
    return tuple(gpus[:wanted])


def _requested(requests: tuple[DeviceRequest, ...], tensor_parallel_size: int | None) -> tuple[Device, ...]:
    if tensor_parallel_size is not None and tensor_parallel_size != len(requests):
        raise InputError(
            f"{tensor_parallel_size} tensor parallel ranks and {len(requests)} devices contradict each other; give one"
        )
    kinds = {request.kind for request in requests}
    if len(kinds) > 1:
        raise InputError("devices: all ranks must be of one kind: GPUs, CPU ranks, or (for plan) sizes")
    if len(requests) > MAX_RANKS:
        raise InputError(f"devices: {len(requests)} ranks; at most {MAX_RANKS} are possible")
    if kinds == {"cpu"}:
        return _cpu_ranks(requests)
    if kinds == {"cuda"}:
        return _cuda_ranks(requests)
    sizes = [request.cap_bytes or 0 for request in requests]
    return tuple(Device(f"device:{i}", "any", i, size, size) for i, size in enumerate(sizes))


def _cuda_ranks(requests: Sequence[DeviceRequest]) -> tuple[Device, ...]:
    gpus = {gpu.index: gpu for gpu in find_gpus() or _amd_gpus()}
    found = []
    for request in requests:
        gpu = gpus.get(request.index)
        if gpu is None:
            raise InputError(f"devices: {request.name} does not exist; this machine has {_list(list(gpus.values()))}")
        capacity = gpu.capacity_bytes if request.cap_bytes is None else min(request.cap_bytes, gpu.capacity_bytes)
        found.append(Device(gpu.name, "cuda", gpu.index, capacity, gpu.total_bytes, gpu.description, gpu.uuid))
    return tuple(found)


def _amd_gpus() -> list[Device]:
    """For who names them: nothing has run on such a GPU yet, so they are never chosen unasked."""
    return [
        Device(f"cuda:{index}", "cuda", index, gpu.free, gpu.total, f"AMD {gpu.name}")
        for index, gpu in enumerate(find_amd_gpus())
    ]


def _list(gpus: Sequence[Device]) -> str:
    names = [f"{gpu.name} ({gpu.description}, {gpu.capacity_bytes / 1e9:.1f} GB free)" for gpu in gpus]
    return ", ".join(names) if names else "no usable NVIDIA GPU"


def find_gpus() -> list[Device]:
    """NVIDIA GPUs that this process may use, numbered as CUDA numbers them under CUDA_VISIBLE_DEVICES; none where
    there is no driver. Capacity is the memory that is free now."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = _visible(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        return [_gpu(pynvml, index, handle) for index, handle in enumerate(handles)]
    finally:
        pynvml.nvmlShutdown()


def _visible(nvml: Any, variable: str | None) -> list[Any]:
    """Handles of the GPUs that CUDA_VISIBLE_DEVICES lets through, in its order. As in CUDA the list ends at the first
    entry that names no GPU."""
    everything = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if variable is None:
        return everything
    chosen = []
    for entry in (part.strip() for part in variable.split(",")):
        handle = _handle(nvml, everything, entry)
        if handle is None:
            break
        chosen.append(handle)
    return chosen


def _handle(nvml: Any, everything: Sequence[Any], entry: str) -> Any:
    """The GPU with this number, or whose UUID starts so, or a MIG instance; None when there is no such one."""
    if entry.startswith("MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(entry)
        except nvml.NVMLError:
            return None
    if entry.isdigit():
        return everything[int(entry)] if int(entry) < len(everything) else None
    matching = [h for h in everything if entry and _text(nvml.nvmlDeviceGetUUID(h)).startswith(entry)]
    return matching[0] if len(matching) == 1 else None


def _gpu(nvml: Any, index: int, handle: Any) -> Device:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name, uuid = _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlDeviceGetUUID(handle))
    return Device(f"cuda:{index}", "cuda", index, int(memory.free), int(memory.total), name, uuid)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cpu_ranks(requests: Sequence[DeviceRequest]) -> tuple[Device, ...]:
    """Each rank may use an equal share of the memory that is available (the page cache counts as available), or its
    cap if that is less."""
    available, total = host_memory()
    share = available // len(requests)
    return tuple(
        Device(
            request.name,
            "cpu",
            request.index,
            share if request.cap_bytes is None else min(request.cap_bytes, share),
            total,
            "CPU",
        )
        for request in requests
    )


def host_memory() -> tuple[int, int]:
    """(available, total) bytes of host memory, within the limit of this process's control group."""
    import psutil

    memory = psutil.virtual_memory()
    available, total = int(memory.available), int(memory.total)
    for limit, used in _cgroup_limits(Path("/sys/fs/cgroup")):
        available, total = min(available, max(0, limit - used)), min(total, limit)
    return available, total


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, bytes in use without the page cache) where a container limits memory (cgroup v2, else v1)."""
    for limit_file, usage_file, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
    ):
        try:
            limit = (root / limit_file).read_text().strip()
            used = int((root / usage_file).read_text())
            statistics = (root / limit_file).with_name("memory.stat").read_text().split()
        except (OSError, ValueError):
            continue
        if not limit.isdigit():
            return []  # "max": no limit
        counts = dict(zip(statistics[::2], statistics[1::2], strict=False))
        cache = sum(int(counts.get(prefix + key, "0")) for key in ("inactive_file", "active_file"))
        return [(int(limit), max(0, used - cache))]
    return []
