"""Log-probabilities of chosen tokens, their ranks and the likeliest of each row as one launch: logprobs.cu."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from multitensor.kernels.cuda.program import Program, launch
from multitensor.kernels.host_copy import Uploads

MOST = 20  # of the likeliest that a launch finds
THREADS = 256
_HELD = 16  # logits of a thread
_STRETCHES = 128  # of a row at most
_NOTE_BYTES = 8 * (MOST + 2)  # struct Note of logprobs.cu
_MOST_ROWS = 64  # of one launch


class CudaLogprobs:
    """For rows of so many logits; its launches follow one another on one stream."""

    def __init__(self, columns: int, device: torch.device) -> None:
        """Raises ValueError where a row is longer than a launch takes."""
        self._parts = -(-columns // (THREADS * _HELD))
        if self._parts > _STRETCHES:
            raise ValueError(f"rows of {columns} logits are longer than {_STRETCHES} blocks take")
        self._columns = columns
        self._kernel: Any = Program(("weights.cu", "logprobs.cu"), {"THREADS": THREADS}, device).kernel("tell")
        self._notes = torch.zeros(_MOST_ROWS * self._parts * _NOTE_BYTES, dtype=torch.uint8, device=device)
        self._counters = torch.zeros(_MOST_ROWS, dtype=torch.int32, device=device)
        self._uploads = Uploads(device)

    def run(self, logits: torch.Tensor, ids: torch.Tensor, rows: np.ndarray, most: int) -> torch.Tensor:
        """See TokenChooser.logprobs."""
        if logits.shape[1] != self._columns or logits.stride(1) != 1 or logits.dtype != torch.float32:
            raise ValueError(f"logits must be float32 rows of {self._columns}")
        if most > min(MOST, self._columns):
            raise ValueError(f"{most} of the likeliest are more than the {min(MOST, self._columns)} of a launch")
        count, width = len(rows), 2 + 2 * most
        out = torch.empty(count, width, dtype=torch.int64, device=logits.device)
        places = self._uploads.send(rows.astype(np.int32))
        length = -(-self._columns // self._parts)
        for start in range(0, count, _MOST_ROWS):
            grid = (self._parts, min(_MOST_ROWS, count - start))
            numbers = (self._columns, logits.stride(0), places[4 * start :], ids, most, length)
            launch(self._kernel, grid, THREADS, 0, (logits, *numbers, self._notes, self._counters, out[start:]))
        return out
