"""Sampling of a step's rows as one launch: choose.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from multitensor.kernels.cuda.logprobs import MOST, CudaLogprobs
from multitensor.kernels.cuda.program import Program, launch
from multitensor.kernels.host_copy import Uploads
from multitensor.kernels.token_rows import ROW

THREADS = 512
_PER_THREAD = 16  # logits
_ALONE = 4  # of a row that has the GPU to itself: more blocks have more to exchange
_MOST_PARTS, _SPLITS, _BINS = 64, 7, 1024  # of choose.cu
_STATE_BYTES = 8 * (2 + _MOST_PARTS) + 12 * _SPLITS * _BINS  # its struct State
_SHARED_BYTES = 35 << 10  # of a block, and what the driver adds. It has registers for two on every GPU
MOST_ROWS = 64  # of one launch


class CudaTokenChooser:
    """See kernels/token_rows.py. Its launches follow one another on one stream.

    parts: blocks of a row, other than what the device is best served with. Results do not depend on it.
    """

    def __init__(self, columns: int, device: torch.device, parts: int | None = None) -> None:
        """Raises ValueError where a row needs more blocks than the GPU runs at once: they wait for each other."""
        self._columns, self._device, self._given = columns, device, parts
        properties = torch.cuda.get_device_properties(device)
        self._processors = int(properties.multi_processor_count)
        self._fewest = -(-columns // (THREADS * _PER_THREAD))
        room = self._processors * max(1, min(2, properties.shared_memory_per_multiprocessor // _SHARED_BYTES))
        if max(self._fewest, parts or 1) > min(room, _MOST_PARTS):
            raise ValueError(
                f"rows of {columns} logits need {self._fewest} blocks at once, the GPU has room for {room}"
            )
        self._kernel: Any = Program(("weights.cu", "choose.cu"), {"THREADS": THREADS}, device).kernel("choose")
        self._uploads = Uploads(device)
        self._states = torch.zeros(MOST_ROWS, _STATE_BYTES, dtype=torch.uint8, device=device)
        self._turns = torch.zeros(1, dtype=torch.int32, device=device)
        self._logprobs = CudaLogprobs(columns, device)

    def run(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        masks: Sequence[np.ndarray],
        history: torch.Tensor,
        last: torch.Tensor,
    ) -> torch.Tensor:
        count, columns = logits.shape
        if columns != self._columns or logits.stride(1) != 1 or logits.dtype != torch.float32:
            raise ValueError(f"logits must be float32 rows of {self._columns}")
        words = len(masks[0]) if masks else 0
        if masks and (32 * words < columns or any(len(mask) != words for mask in masks)):
            raise ValueError(f"masks of {words} words are not for {columns} tokens")
        ids = torch.empty(count, dtype=torch.int64, device=self._device)
        sent = self._uploads.send(rows, *masks)
        allowed = sent[rows.nbytes :]
        for start in range(0, count, MOST_ROWS):
            number = min(MOST_ROWS, count - start)
            parts = self._parts(number)
            length = -(-columns // (4 * parts)) * 4
            numbers = (
                columns,
                logits.stride(0),
                sent[start * ROW.itemsize :],
                allowed,
                words,
                history,
                history.shape[1],
            )
            arguments = (logits[start:], *numbers, last, ids[start:], parts, length, self._turns, self._states)
            launch(self._kernel, parts * number, THREADS, 0, arguments)
        return ids

    def logprobs(self, logits: torch.Tensor, ids: torch.Tensor, rows: np.ndarray, most: int) -> torch.Tensor | None:
        if most > MOST:
            return None
        return self._logprobs.run(logits, ids, rows, most)

    def _parts(self, rows: int) -> int:
        """Blocks of a row: as many as its logits need at sixteen a thread; more where the GPU would have idle
        multiprocessors, down to four a thread."""
        if self._given is not None:
            return self._given
        spread = -(-self._columns // (THREADS * _ALONE))
        return max(self._fewest, min(spread, self._processors // rows, _MOST_PARTS))
