"""Numbers of the host on their way to a device."""

from __future__ import annotations

import numpy as np
import torch

_TURNS = 3  # of buffers: one step is under way, one is being made


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, queued on its current stream, for which the host does not wait: a copy from ordinary memory
    would first wait for all that is queued before it. On a CPU it is the array itself, where it is contiguous."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Uploads:
    """Several arrays a step as one copy, through page-locked buffers of its own, which are used in turn: quicker than
    `to_device`, which looks for one every time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turn = 0
        self._hosts = [torch.empty(0, dtype=torch.uint8)] * _TURNS
        self._copied = [] if device.type == "cpu" else [torch.cuda.Event() for _ in range(_TURNS)]
        self._there = torch.empty(0, dtype=torch.uint8, device=device)

    def send(self, *arrays: np.ndarray) -> torch.Tensor:
        """Contiguous arrays [n] -> their bytes on the device, one behind the other, valid until the next call's copy
        runs on the stream. Waits only where three copies are under way already."""
        size = sum(array.nbytes for array in arrays)
        self._reserve(size)
        host = self._hosts[self._turn]
        if self._copied:
            self._copied[self._turn].synchronize()
        bytes_, at = host.numpy(), 0
        for array in arrays:
            bytes_[at : at + array.nbytes] = array.view(np.uint8)
            at += array.nbytes
        self._there[:size].copy_(host[:size], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()
        self._turn = (self._turn + 1) % _TURNS
        return self._there[:size]

    def _reserve(self, size: int) -> None:
        """Buffers that grow are replaced; torch keeps the old ones until the copies from and to them are over."""
        if size > len(self._hosts[self._turn]):
            room = 1 << (size - 1).bit_length()
            self._hosts[self._turn] = torch.empty(room, dtype=torch.uint8, pin_memory=self._device.type != "cpu")
        if size > len(self._there):
            room = 1 << (size - 1).bit_length()
            self._there = torch.empty(room, dtype=torch.uint8, device=self._device)
