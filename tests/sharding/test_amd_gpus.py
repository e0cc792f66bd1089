"""AMD's GPUs from the kernel's files: a stand-in for /sys, and the variables that hide and renumber GPUs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import pytest

from multitensor.config import parse_devices
from multitensor.errors import InputError
from multitensor.sharding import topology
from multitensor.sharding.amd_gpus import AmdGpu, find_amd_gpus

GIB = 1 << 30
# Nodes as the kernel numbers them: a processor, GPUs that are not in the order of their names as text, and one that may
# not be read.
GPUS = {1: (24, 110000, 128), 2: (192, 90402, 129), 10: (64, 90010, 130)}
LISTED = [
    AmdGpu(24 * GIB, 18 * GIB, "gfx1100"),
    AmdGpu(192 * GIB, 144 * GIB, "gfx942"),
    AmdGpu(64 * GIB, 48 * GIB, "gfx90a"),
]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine with three GPUs and AMD's build of torch."""
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    write(nodes / "0/properties", "cpu_cores_count 32\nsimd_count 0\ndrm_render_minor 0\n")
    for node, (size, version, minor) in GPUS.items():
        write(
            nodes / f"{node}/properties",
            f"cpu_cores_count 0\nsimd_count 96\ndrm_render_minor {minor}\ngfx_target_version {version}\n"
            f"unique_id {0xABC0 + node}\n",
        )
        device = tmp_path / f"sys/class/drm/renderD{minor}/device"
        write(device / "mem_info_vram_total", f"{size * GIB}\n")
        write(device / "mem_info_vram_used", f"{size * GIB // 4}\n")
    write(nodes / "11/properties", "simd_count 96\ndrm_render_minor 131\ngfx_target_version 90402\n")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+rocm7.1")
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"ROCR_VISIBLE_DEVICES": "2,0"}, [2, 0]),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "1, 2"}, [1, 2]),
        ({"ROCR_VISIBLE_DEVICES": "2,1", "HIP_VISIBLE_DEVICES": "1,0"}, [1, 2]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-000000000000ABC2,0"}, [1, 0]),
        ({"HIP_VISIBLE_DEVICES": "0,7,1"}, [0]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_in_torchs_order(system: Path, variables: Mapping[str, str], expected: list[int]) -> None:
    assert find_amd_gpus(system, variables) == [LISTED[i] for i in expected]


def test_other_builds_of_torch_look_for_none(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+cu130")
    assert find_amd_gpus(system, {}) == []


def test_no_driver(tmp_path: Path, system: Path) -> None:
    assert find_amd_gpus(tmp_path / "elsewhere", {}) == []


def test_they_are_used_only_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "find_gpus", list)
    monkeypatch.setattr(topology, "find_amd_gpus", lambda: LISTED)
    assert [device.kind for device in topology.find_devices()] == ["cpu"]
    devices = topology.find_devices(parse_devices("cuda:1,cuda:0=4GiB"))
    assert [(d.name, d.capacity_bytes, d.total_bytes) for d in devices] == [
        ("cuda:1", 144 * GIB, 192 * GIB),
        ("cuda:0", 4 * GIB, 24 * GIB),
    ]
    assert devices[0].description == "AMD gfx942"
    with pytest.raises(InputError, match=r"cuda:3 does not exist; .*AMD gfx90a"):
        topology.find_devices(parse_devices("cuda:3"))


def test_nvidias_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia = topology.Device("cuda:0", "cuda", 0, GIB, GIB)
    monkeypatch.setattr(topology, "find_gpus", lambda: [nvidia])
    monkeypatch.setattr(topology, "find_amd_gpus", lambda: LISTED)
    assert topology.find_devices(parse_devices("cuda:0")) == (nvidia,)
