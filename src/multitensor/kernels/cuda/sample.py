"""Greedy sampling on the device, made to be captured in a CUDA graph: sample.cu."""

from __future__ import annotations

import torch

from multitensor.kernels.cuda.program import Program, launch

_BLOCKS = 64  # of a row at most


class GreedySampler:
    """For up to `sequences` rows; its launches follow one another on one stream."""

    def __init__(self, sequences: int, device: torch.device) -> None:
        self._kernel = Program(("weights.cu", "sample.cu"), {}, device).kernel("greedy")
        self.ids = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._best = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._counters = torch.zeros(sequences, dtype=torch.int32, device=device)

    def run(self, logits: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, last: torch.Tensor) -> None:
        """logits float32 [S, V] -> the index of each row's largest (the lowest of equals; NaN counts as the largest) in
        `ids` and, where positions[row] >= 0, in last[slots[row]]. positions, slots: int32 [S]; last: int64."""
        rows, columns = logits.shape
        blocks = max(1, min(_BLOCKS, columns // 1024))
        arguments = (logits, columns, positions, slots, self.ids, last, self._best, self._counters)
        launch(self._kernel, (blocks, rows), 256, 0, arguments)
