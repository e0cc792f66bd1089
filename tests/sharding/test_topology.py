"""Devices: GPUs through a stand-in for NVML, CPU ranks from this machine's memory, and what does not exist."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from multitensor.config import parse_devices
from multitensor.errors import InputError
from multitensor.sharding import topology
from multitensor.sharding.topology import find_devices

GIB = 1 << 30


class FakeNvml:
    """GPUs of 24, 48 and 80 GiB, a quarter of each in use, in the order of the PCI bus."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.sizes = [24 * GIB, 48 * GIB, 80 * GIB]
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.sizes)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid != "MIG-7":
            raise self.NVMLError
        return 2

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}a{handle}b".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        size = self.sizes[handle]
        return SimpleNamespace(total=size, free=size * 3 // 4)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "find_gpus", list)


def test_every_gpu_is_the_default_with_its_free_memory(nvml: FakeNvml) -> None:
    found = find_devices()
    assert [device.name for device in found] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [device.capacity_bytes for device in found] == [18 * GIB, 36 * GIB, 60 * GIB]
    assert (found[1].total_bytes, found[1].description, found[1].uuid) == (48 * GIB, "Card 1", "GPU-1a1b")
    assert nvml.open == 0


def test_tp_takes_the_first_gpus_and_names_those_there_are(nvml: FakeNvml) -> None:
    assert [device.name for device in find_devices(None, 2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(InputError, match=r"4 tensor parallel ranks: .*cuda:2 \(Card 2, 64.4 GB free\).* devices cpu:4"):
        find_devices(None, 4)


@pytest.mark.parametrize(
    ("variable", "cards"),
    [
        ("2,0", ["Card 2", "Card 0"]),
        ("", []),
        ("-1", []),
        ("1,7,0", ["Card 1"]),  # CUDA stops at the first that does not exist
        ("GPU-2a", ["Card 2"]),
        ("GPU-", []),  # ambiguous
        ("MIG-7", ["Card 2"]),
        ("MIG-8", []),
    ],
)
def test_cuda_visible_devices_is_respected(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, variable: str, cards: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    gpus = topology.find_gpus()
    assert [gpu.description for gpu in gpus] == cards
    assert [gpu.name for gpu in gpus] == [f"cuda:{i}" for i in range(len(cards))]


def test_caps_bind_only_below_what_is_free(nvml: FakeNvml) -> None:
    found = find_devices(parse_devices("cuda:2=1GiB,cuda:0=23GiB"))
    assert [(device.name, device.capacity_bytes) for device in found] == [("cuda:2", GIB), ("cuda:0", 18 * GIB)]


def test_a_gpu_that_does_not_exist_is_refused_with_those_that_do(nvml: FakeNvml) -> None:
    with pytest.raises(InputError, match="cuda:3 does not exist; this machine has cuda:0 "):
        find_devices(parse_devices("cuda:0,cuda:3"))


def test_without_a_driver_there_are_no_gpus(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FakeNvml.NVMLError

    monkeypatch.setattr(nvml, "nvmlInit", fail)
    assert topology.find_gpus() == []
    with pytest.raises(InputError, match="no usable NVIDIA GPU"):
        find_devices(parse_devices("cuda:0"))


def test_cpu_ranks_share_the_available_memory(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "host_memory", lambda: (12 * GIB, 16 * GIB))
    assert [device.capacity_bytes for device in find_devices(None, 3)] == [4 * GIB] * 3
    assert [device.name for device in find_devices()] == ["cpu:0"]
    capped = find_devices(parse_devices("cpu:2=1GiB"))
    assert [(device.name, device.capacity_bytes) for device in capped] == [("cpu:0", GIB), ("cpu:1", GIB)]
    assert find_devices(parse_devices("cpu:1=100GiB"))[0].capacity_bytes == 12 * GIB


@pytest.mark.parametrize("tp", [0, -1, 65])
def test_a_number_of_ranks_that_makes_no_sense_is_refused(no_gpus: None, tp: int) -> None:
    with pytest.raises(InputError, match=f"{tp} tensor parallel ranks"):
        find_devices(None, tp)


def test_requests_that_contradict_each_other_are_refused(nvml: FakeNvml) -> None:
    with pytest.raises(InputError, match="contradict"):
        find_devices(parse_devices("cpu:2"), 3)
    with pytest.raises(InputError, match="one kind"):
        find_devices(parse_devices("cpu:1,cuda:0"))


def test_bare_sizes_are_devices_to_plan_with() -> None:
    found = find_devices(parse_devices("24GiB,12GiB"))
    assert [(device.name, device.kind, device.capacity_bytes) for device in found] == [
        ("device:0", "any", 24 * GIB),
        ("device:1", "any", 12 * GIB),
    ]


def test_host_memory_is_what_the_system_has_available() -> None:
    available, total = topology.host_memory()
    memory = psutil.virtual_memory()
    assert 0 < available <= total <= memory.total
    assert available <= memory.available + (1 << 30)


def write_cgroup(folder: Path, limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("1000\n")
    (folder / "memory.stat").write_text("anon 100\nfile 600\ninactive_file 500\nactive_file 50\n")


def test_a_containers_limit_counts_without_its_page_cache(tmp_path: Path) -> None:
    write_cgroup(tmp_path, "4000")
    assert topology._cgroup_limits(tmp_path) == [(4000, 450)]
    write_cgroup(tmp_path, "max")
    assert topology._cgroup_limits(tmp_path) == []
    assert topology._cgroup_limits(tmp_path / "nothing") == []


def test_the_older_form_of_a_containers_limit(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("5000\n")
    (folder / "memory.usage_in_bytes").write_text("900\n")
    (folder / "memory.stat").write_text("total_inactive_file 300\ntotal_active_file 100\n")
    assert topology._cgroup_limits(tmp_path) == [(5000, 500)]
