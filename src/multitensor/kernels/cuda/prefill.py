"""The small kernels of an eager step, any number of tokens: one launch instead of several passes of plain torch."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch

from multitensor.kernels.cuda.program import Program, launch

_KINDS = {torch.float16: 0, torch.bfloat16: 1}
_THREADS = 256
_EIGHT = 8  # numbers that a thread takes


class PrefillKernels:
    """On one device; each variant is compiled when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._programs: dict[torch.dtype, Program] = {}

    @cached_property
    def overlap(self) -> bool:
        """Programmatic dependent launch exists from compute capability 9.0 on."""
        return torch.cuda.get_device_capability(self.device) >= (9, 0)

    def gate_takes(self, gate: torch.Tensor, up: torch.Tensor) -> bool:
        """Whether `gated_activation` can do it."""
        return (
            gate.dtype in _KINDS
            and gate.dtype == up.dtype
            and gate.shape == up.shape
            and gate.numel() > 0
            and all(_in_eights(x) for x in (gate, up))
        )

    def gated_activation(
        self, gate: torch.Tensor, up: torch.Tensor, kind: Literal["silu", "gelu_tanh"]
    ) -> torch.Tensor:
        """gate, up [T, F], float16 or bfloat16, rows of any stride in eights -> activation(gate) * up, contiguous.
        In float32, rounded once."""
        tokens, columns = gate.shape
        out = torch.empty((tokens, columns), dtype=gate.dtype, device=gate.device)
        if gate.dtype not in self._programs:
            self._programs[gate.dtype] = Program("prefill.cu", {"X_KIND": _KINDS[gate.dtype]}, self.device)
        kernel = self._programs[gate.dtype].kernel("gated_activation")
        eights = columns // _EIGHT
        arguments = (gate, up, out, eights, gate.stride(0), up.stride(0), int(kind == "gelu_tanh"))
        launch(kernel, (tokens, -(-eights // _THREADS)), _THREADS, 0, arguments, overlap=self.overlap)
        return out


def _in_eights(x: torch.Tensor) -> bool:
    """[T, F] whose rows are runs of aligned vectors of eight 16-bit numbers."""
    rows = x.dim() == 2 and x.stride(1) == 1 and x.stride(0) % _EIGHT == 0
    return rows and x.shape[1] % _EIGHT == 0 and x.data_ptr() % 16 == 0
