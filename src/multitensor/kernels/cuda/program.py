"""CUDA C++ at run time: NVRTC through cuda-core, with a cache of compiled kernels on disk. No toolkit is needed.

Sources include no header, so NVRTC looks for none. A compiled file is keyed by source, defines, architecture and
compiler version, so a new version of any of them compiles anew and nothing stale is ever loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

SOURCES = Path(__file__).parent
_ONE_AT_A_TIME = threading.Lock()  # ranks that are threads: cuda.core cannot be imported by two at once


def cache_folder() -> Path:
    """$MULTITENSOR_KERNEL_CACHE, or ~/.cache/multitensor/kernels."""
    chosen = os.environ.get("MULTITENSOR_KERNEL_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "multitensor" / "kernels"


class Program:
    """The kernels of one or more .cu files, one behind the other, with one set of defines, for one device.

    Of several files the last gives the kernels; those before it only lend their device functions. features: "a" for
    what this architecture alone has.
    """

    def __init__(
        self,
        sources: str | tuple[str, ...],
        defines: Mapping[str, object],
        device: torch.device,
        features: Literal["", "a"] = "",
    ) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        self._device = device
        with _ONE_AT_A_TIME:
            from cuda.core import ObjectCode

            self._module = ObjectCode.from_cubin(_compiled(sources, defines, f"sm_{major}{minor}{features}"))
        self._kernels: dict[str, Any] = {}

    def kernel(self, name: str) -> Any:
        """A kernel by its extern "C" name, allowed all the shared memory that the device has for a block."""
        if name not in self._kernels:
            kernel = self._module.get_kernel(name)
            _allow_shared(kernel, self._device)
            self._kernels[name] = kernel
        return self._kernels[name]


def launch(
    kernel: Any,
    grid: int | tuple[int, ...],
    block: int,
    shared_bytes: int,
    arguments: tuple[Any, ...],
    *,
    overlap: bool = False,
) -> None:
    """Launches on torch's current stream. arguments: tensors (their address), ints (32 bits) and floats (32 bits).

    overlap: programmatic dependent launch; the kernel must wait (griddepcontrol.wait) before it touches what the one
    before it wrote.
    """
    start = _starter()
    values = [
        a.data_ptr() if isinstance(a, torch.Tensor) else _integer(a) if type(a) is int else _argument(a)
        for a in arguments
    ]
    config = _config(threading.get_ident(), grid, block, shared_bytes, overlap)
    start(_stream(_current_stream()), config, kernel, *values)


# A step of a prompt makes some 400 launches, and the host must stay ahead of the GPU. So what depends on nothing but a
# launch's numbers is made once: of 10 microseconds a launch, 4 are left.


@cache
def _starter() -> Callable[..., None]:
    from cuda.core import launch as start

    return start


@lru_cache(maxsize=4096)
def _config(thread: int, grid: int | tuple[int, ...], block: int, shared_bytes: int, overlap: bool) -> Any:
    """cuda.core's LaunchConfig. thread: whose it is, as a launch writes into its configuration."""
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes, programmatic_stream_serialization=overlap)


@lru_cache(maxsize=4096)
def _integer(value: int) -> np.int32:
    """OverflowError where 32 bits do not hold it."""
    return np.int32(value)


def _argument(value: Any) -> Any:
    return np.float32(value) if isinstance(value, float) else np.int32(value)


@cache
def _raw_stream() -> tuple[Callable[[], int], Callable[[int], int]] | None:
    """torch's current device, and a device's current stream, as bare numbers; None where torch does not tell them."""
    device = getattr(torch._C, "_cuda_getDevice", None)
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return None if device is None or stream is None else (device, stream)


def _current_stream() -> int:
    raw = _raw_stream()
    if raw is None:
        return int(torch.cuda.current_stream().cuda_stream)
    device, stream = raw
    return stream(device())


@cache
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


@cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may ask for."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    error, limit = driver.cuDeviceGetAttribute(attribute, device.index or 0)
    if int(error) != 0:
        raise RuntimeError(f"cuDeviceGetAttribute: {error}")
    return int(limit)


def _allow_shared(kernel: Any, device: torch.device) -> None:
    from cuda.bindings import driver

    attributes = driver.CUfunction_attribute
    declared = attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES  # counts towards the same limit
    error, fixed = driver.cuKernelGetAttribute(declared, kernel.handle, device.index or 0)
    if int(error) != 0:
        raise RuntimeError(f"cuKernelGetAttribute: {error}")
    dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(dynamic, shared_limit(device) - fixed, kernel.handle, device.index or 0)
    if int(error) != 0:
        raise RuntimeError(f"cuKernelSetAttribute: {error}")


def source_text(sources: str | tuple[str, ...], defines: Mapping[str, object]) -> str:
    """What the compiler gets: the defines, then the files."""
    files = (sources,) if isinstance(sources, str) else sources
    parts = [f"#define {name} {value}\n" for name, value in defines.items()]
    if len(files) > 1:
        parts.append("#define LEND_DEVICE_FUNCTIONS\n")
    return "".join(parts + [(SOURCES / file).read_text() for file in files])


def _compiled(sources: str | tuple[str, ...], defines: Mapping[str, object], architecture: str) -> bytes:
    from cuda.core import Program as Compilation
    from cuda.core import ProgramOptions

    text = source_text(sources, defines)
    key = hashlib.sha256(f"{architecture}\n{_compiler_version()}\n{text}".encode()).hexdigest()
    last = sources if isinstance(sources, str) else sources[-1]
    path = cache_folder() / f"{Path(last).stem}-{key[:32]}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    options = ProgramOptions(std="c++17", arch=architecture)
    cubin = bytes(Compilation(text, code_type="c++", options=options).compile("cubin").code)
    _store(path, cubin)
    return cubin


@cache
def _compiler_version() -> str:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _store(path: Path, content: bytes) -> None:
    """Whole or not at all: several ranks compile the same kernel at the same time. A full disk only costs time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
