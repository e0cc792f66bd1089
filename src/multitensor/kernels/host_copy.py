"""Numbers of the host on their way to a device."""

from __future__ import annotations

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, queued on its current stream, for which the host does not wait: a copy from ordinary memory
    would first wait for all that is queued before it. On a CPU it is the array itself, where it is contiguous."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
