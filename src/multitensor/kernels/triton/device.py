"""Where Triton launches: its own notion of a current device must be the tensors' device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton


@triton.jit
def _nothing() -> None:
    pass


# Decided by Triton when it is imported (TRITON_INTERPRET=1): kernels run on a CPU, one numpy call an operation.
INTERPRETED = not isinstance(_nothing, triton.runtime.JITFunction)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` the current one of its kind for this thread."""
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).device(device)


def synchronize(device: torch.device) -> None:
    """Waits for all that is queued on `device`."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
