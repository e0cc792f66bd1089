"""(device, exactness) -> the kernels that a rank's model calls. Chosen once a rank; the model knows only `Kernels`."""

from __future__ import annotations

import importlib.util
import warnings

import torch

from multitensor.kernels.cpu import native
from multitensor.kernels.cpu.cpu_kernels import CpuKernels
from multitensor.kernels.torch_kernels import Kernels

__all__ = ["Kernels", "make_kernels"]

OLDEST_CAPABILITY = (7, 5)  # the integer products of kernels/cuda are not in older tensor cores


def make_kernels(device: torch.device, exact: bool, threads: int | None = None) -> Kernels:
    """The best kernels for a device: native ones on a CPU where they are built, CUDA C++ on NVIDIA GPUs, Triton on
    AMD's and Intel's, each use of it tried against plain torch first; else plain torch.

    exact: activations are never rounded to 8 bits. threads: CPU threads of this rank's native kernels (None: as many
    as torch uses).
    """
    if device.type == "cpu":
        built = native.load(threads or torch.get_num_threads())
        if built is not None:
            return CpuKernels(device, exact, built)
    if is_amd_or_intel(device):
        return Kernels(device, exact) if exact else _tried_triton(device)
    if device.type == "cuda" and not exact and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY:
        if importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None:
            from multitensor.kernels.cuda.cuda_kernels import CudaKernels

            return CudaKernels(device, exact)
        warnings.warn(
            "cuda-core is not installed, so quantised weights are computed by plain torch, slowly: "
            "pip install 'multitensor[cuda]'",
            stacklevel=2,
        )
    return Kernels(device, exact)


def is_amd_or_intel(device: torch.device) -> bool:
    """Whether it is a GPU that CUDA C++ does not run on. torch calls AMD's "cuda" too."""
    return device.type == "xpu" or (device.type == "cuda" and torch.version.hip is not None)


def _tried_triton(device: torch.device) -> Kernels:
    """Triton's kernels where it is installed, as it is with torch's own builds for these GPUs; else plain torch."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "triton is not installed, so quantised weights are computed by plain torch, slowly: install the triton "
            "that belongs to this build of torch",
            stacklevel=3,
        )
        return Kernels(device, False)
    from multitensor.kernels.triton.triton_kernels import TritonKernels

    return TritonKernels(device, False)
