"""Can these GPUs write into each other's memory, and does it arrive right? Asked in a process of its own.

`python -m multitensor.parallel.peer_probe SECONDS`: for all GPUs that CUDA_VISIBLE_DEVICES shows it, every one writes
into every other's memory with ordinary stores while the owner polls, as the ranks' reductions will. The last line on
stdout is JSON: {"reason": null} when all is well, else why not.

Some boards claim access and lose or change data, or hang, and a failed mapping may end the process: therefore not in a
rank. Never imports torch: it has to be quick, and to leave the GPUs' memory to the ranks, which load meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATIENCE = 30.0  # seconds for everything; start and contexts take about one
_ARRIVAL_NS = 2_000_000_000  # in which all words have to be there
_WORDS = 1 << 16  # of four bytes, from every GPU to every GPU
_NOTHING = 0x80000000  # NOTHING of probe.cu
_BLOCKS, _THREADS = 32, 256
_PR_SET_PDEATHSIG = 1  # Linux man page PR_SET_PDEATHSIG(2const)
_SOURCE = Path(__file__).parents[1] / "kernels" / "cuda" / "probe.cu"


class PeerProbe:
    """A probe that runs beside this process. uuids: of the GPUs, in rank order."""

    def __init__(self, uuids: Sequence[str], patience: float = PATIENCE) -> None:
        self._deadline = time.monotonic() + patience
        self._patience = patience
        visible = ",".join(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}" for uuid in uuids)
        self._process = subprocess.Popen(
            self._command(patience),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible},
        )

    def _command(self, patience: float) -> list[str]:
        return [sys.executable, "-P", "-m", __name__, str(patience)]

    def reason(self) -> str | None:
        """Waits for the end, at most as long as the patience lasts. None: all is well; else why not, in a few words."""
        try:
            printed, errors = self._process.communicate(timeout=max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # Not waited for: a process that hangs in a driver does not end, and must not take us along.
            self._process.kill()
            return f"the probe of peer access did not end within {self._patience:g} s"
        return read_verdict(self._process.returncode, printed, errors)


def read_verdict(status: int, printed: str, errors: str) -> str | None:
    """What a probe that ended with `status` has found: None, or why peer memory cannot be used."""
    lines = printed.strip().splitlines()
    if status == 0 and lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found = json.loads(lines[-1])["reason"]
            return None if found is None else str(found)
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    said = errors.strip().splitlines()
    return f"the probe of peer access ended with {how}" + (f": {said[-1][:200]}" if said else "")


def main() -> None:
    """Entry point of the probing process."""
    patience = float(sys.argv[1])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.setitimer(signal.ITIMER_REAL, patience)  # SIGALRM ends the process
    try:
        reason = probe()
    except Exception as error:
        reason = f"the probe of peer access failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}"
    sys.stdout.write(json.dumps({"reason": reason}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # contexts vanish with the process, sooner than by being taken down


def probe() -> str | None:
    """None when every visible GPU reaches every other; else why not. Raises RuntimeError where CUDA fails."""
    from cuda.bindings import driver

    _ask(driver.cuInit(0))
    devices = [_ask(driver.cuDeviceGet(i)) for i in range(_ask(driver.cuDeviceGetCount()))]
    if len(devices) < 2:
        return f"the probe of peer access sees {len(devices)} of the ranks' GPUs"
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
    for i, device in enumerate(devices):
        if not _ask(driver.cuDeviceGetAttribute(attribute, device)):
            return f"GPU {i} cannot share its memory between processes"
        for j, other in enumerate(devices):
            if i != j and not _ask(driver.cuDeviceCanAccessPeer(device, other)):
                return f"GPU {i} has no peer access to GPU {j}"
    return _exchange(driver, devices)


def _exchange(driver: Any, devices: list[Any]) -> str | None:
    """Lets all GPUs write to all and read at the same time; None when every word arrived as it was written."""
    contexts = [_ask(driver.cuDevicePrimaryCtxRetain(device)) for device in devices]
    size = len(devices) * _WORDS * 4
    buffers = [_shared_buffer(driver, devices, owner, size) for owner in range(len(devices))]
    running = []
    for context, buffer in zip(contexts, buffers, strict=True):
        _ask(driver.cuCtxSetCurrent(context))
        _ask(driver.cuMemsetD32(buffer, _NOTHING, len(devices) * _WORDS))
        _ask(driver.cuCtxSynchronize())
    kernels = []
    for context, device in zip(contexts, devices, strict=True):
        _ask(driver.cuCtxSetCurrent(context))
        kernels.append(_kernel(driver, device))
    table = (ctypes.c_uint64 * len(buffers))(*map(int, buffers))
    for number, (context, kernel) in enumerate(zip(contexts, kernels, strict=True)):
        _ask(driver.cuCtxSetCurrent(context))
        places, verdict = _ask(driver.cuMemAlloc(ctypes.sizeof(table))), _ask(driver.cuMemAlloc(8))
        _ask(driver.cuMemcpyHtoD(places, ctypes.addressof(table), ctypes.sizeof(table)))
        _ask(driver.cuMemsetD32(verdict, 0, 2))
        _ask(driver.cuCtxSynchronize())
        values = (places, verdict, _ARRIVAL_NS, number, len(devices), _WORDS)
        types = (None, None, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int)
        running.append((kernel, (values, types), verdict))
    for context, (kernel, arguments, _) in zip(contexts, running, strict=True):
        _ask(driver.cuCtxSetCurrent(context))
        _ask(driver.cuLaunchKernel(kernel, _BLOCKS, 1, 1, _THREADS, 1, 1, 0, 0, arguments, 0))
    for number, (context, (_, _, verdict)) in enumerate(zip(contexts, running, strict=True)):
        counts = (ctypes.c_uint32 * 2)()
        _ask(driver.cuCtxSetCurrent(context))
        _ask(driver.cuCtxSynchronize())
        _ask(driver.cuMemcpyDtoH(ctypes.addressof(counts), verdict, 8))
        if counts[0] or counts[1]:
            return (
                f"of what peers wrote into GPU {number}'s memory {counts[0]} words were wrong and {counts[1]} did not "
                f"arrive within {_ARRIVAL_NS / 1e9:.0f} s, of {len(devices) * _WORDS}"
            )
    return None


def _shared_buffer(driver: Any, devices: list[Any], owner: int, size: int) -> Any:
    """Address of memory on one GPU that all of them may read and write, made as the ranks' will be."""
    kind = driver.CUmemAllocationProp()
    kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    kind.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    kind.location.id = int(devices[owner])
    kind.requestedHandleTypes = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    flags = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    granularity = int(_ask(driver.cuMemGetAllocationGranularity(kind, flags)))
    size = -(-size // granularity) * granularity
    handle = _ask(driver.cuMemCreate(size, kind, 0))
    address = _ask(driver.cuMemAddressReserve(size, granularity, 0, 0))
    _ask(driver.cuMemMap(address, size, 0, handle, 0))
    rights = []
    for device in devices:
        right = driver.CUmemAccessDesc()
        right.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        right.location.id = int(device)
        right.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        rights.append(right)
    _ask(driver.cuMemSetAccess(address, size, rights, len(rights)))
    return address


def _kernel(driver: Any, device: Any) -> Any:
    """`exchange`, compiled for a device and loaded into the current context."""
    from cuda.core import Program, ProgramOptions

    attributes = driver.CUdevice_attribute
    major = _ask(driver.cuDeviceGetAttribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    minor = _ask(driver.cuDeviceGetAttribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    options = ProgramOptions(std="c++17", arch=f"sm_{major}{minor}")
    cubin = bytes(Program(_SOURCE.read_text(), code_type="c++", options=options).compile("cubin").code)
    return _ask(driver.cuModuleGetFunction(_ask(driver.cuModuleLoadData(cubin)), b"exchange"))


def _ask(answer: Any) -> Any:
    """The value of a driver call that returns (error, value) or (error,). Raises RuntimeError."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"CUDA says {error.name}")
    return values[0] if values else None


if __name__ == "__main__":
    main()
