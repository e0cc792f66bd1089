"""Counters that several GPUs see, raised and awaited in streams: flags.cu. Has run for ranks that share one
GPU, not yet for two."""

from __future__ import annotations

import torch

from multitensor.kernels.cuda.program import Program, launch

PATIENCE_SECONDS = 30.0  # after which a rank whose peers did not come fails with a CUDA error


class Flags:
    """One rank's end, on its device. limit_ms: of a wait, after which the process ends with an error; below 0 it goes
    on instead, and `late` counts that."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self.patience_ms = rank, int(1000 * PATIENCE_SECONDS)
        self.limit_ms = self.patience_ms
        self._late = torch.zeros(1, dtype=torch.int32, device=device)
        program = Program("flags.cu", {}, device)
        self._raise, self._await = program.kernel("raise_flag"), program.kernel("await_flags")

    @property
    def late(self) -> int:
        """Waits in vain so far. Waits for the device."""
        return int(self._late)

    def raise_flag(self, addresses: torch.Tensor, value: int) -> None:
        """On the current stream: this rank's flag becomes `value` (modulo 2^32) once the stream has come that far.
        addresses: int64 [ranks] on the device, of every rank's flag, uint32."""
        launch(self._raise, 1, 1, 0, (addresses, self.rank, _wrapped(value)))

    def await_flags(self, addresses: torch.Tensor, value: int) -> None:
        """The current stream goes on when all other ranks' flags have reached `value`."""
        arguments = (addresses, self._late, self.rank, addresses.numel(), _wrapped(value), self.limit_ms)
        launch(self._await, 1, 32, 0, arguments)


def _wrapped(value: int) -> int:
    """As 32 bits with a sign, as arguments of kernels are passed."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)
