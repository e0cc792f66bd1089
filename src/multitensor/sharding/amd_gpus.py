"""AMD's GPUs as the Linux kernel lists them (never imports torch).

Sources: the kernel's documentation of amdgpu's sysfs files; AMD's documentation of GPU isolation for the variables that
hide and renumber GPUs. Not yet tried on a machine with such a GPU.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_NODES = "sys/class/kfd/kfd/topology/nodes"


class AmdGpu(NamedTuple):
    """total, free: bytes of its own memory. name: its architecture, such as "gfx942"."""

    total: int
    free: int
    name: str


class _Node(NamedTuple):
    gpu: AmdGpu
    unique_id: int


def find_amd_gpus(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> list[AmdGpu]:
    """Those that this process may use, in the order in which torch numbers them; none where torch is not AMD's build
    or the driver is not there."""
    if not _torch_is_for_amd():
        return []
    variables = os.environ if environment is None else environment
    nodes = [node for path in _numbered(root / _NODES) if (node := _read(root, path)) is not None]
    nodes = _visible(nodes, variables.get("ROCR_VISIBLE_DEVICES"))
    nodes = _visible(nodes, variables.get("HIP_VISIBLE_DEVICES", variables.get("CUDA_VISIBLE_DEVICES")))
    return [node.gpu for node in nodes]


def _torch_is_for_amd() -> bool:
    try:
        return "rocm" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def _numbered(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def _read(root: Path, path: Path) -> _Node | None:
    """None for a processor, and for a GPU whose files may not be read, which cannot be used either."""
    try:
        lines = (line.split() for line in (path / "properties").read_text().splitlines())
        properties = {line[0]: int(line[1]) for line in lines if len(line) == 2}
        if not properties.get("simd_count"):
            return None
        device = root / f"sys/class/drm/renderD{properties['drm_render_minor']}/device"
        total, used = (int((device / f"mem_info_vram_{name}").read_text()) for name in ("total", "used"))
    except (OSError, ValueError, KeyError):
        return None
    version = properties.get("gfx_target_version", 0)  # 90402 is gfx942: the last two numbers are hexadecimal digits
    name = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    return _Node(AmdGpu(total, max(0, total - used), name), properties.get("unique_id", 0))


def _visible(nodes: Sequence[_Node], variable: str | None) -> list[_Node]:
    """The nodes that a list of numbers, or of identities such as "GPU-4b2c1a9f8d3e6f7a", lets through, in its order, up
    to the first entry that names none."""
    if variable is None:
        return list(nodes)
    chosen: list[_Node] = []
    for entry in (part.strip() for part in variable.split(",")):
        if entry.isdigit():
            named = list(nodes[int(entry) : int(entry) + 1])
        else:
            named = [node for node in nodes if entry.lower() == f"gpu-{node.unique_id:016x}"]
        if not named:
            break
        chosen += named
    return chosen
