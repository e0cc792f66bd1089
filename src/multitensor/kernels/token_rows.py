"""How rows of logits are to be sampled, as a device is told: in the layout of `Row` in cuda/choose.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

# slot: whose token it is. top_k: 0 where there is none. history: tokens in the slot's history, -1 where the row has no
# penalties; prompt: of the prompt among them. mask: which of the step's masks, -1: none. least: the logarithm of min-p.
# share: in [0, 1).
ROW = np.dtype(
    [
        ("slot", np.int32),
        ("top_k", np.int32),
        ("history", np.int32),
        ("prompt", np.int32),
        ("mask", np.int32),
        ("unused", np.int32),
        ("temperature", np.float32),
        ("least", np.float32),
        ("top_p", np.float32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("share", np.float64),
    ]
)


class TokenChooser(Protocol):
    """Samples on the device in one launch what engine/sampler.py would with many of torch's operations."""

    def run(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        masks: Sequence[np.ndarray],
        history: torch.Tensor,
        last: torch.Tensor,
    ) -> torch.Tensor:
        """logits: float32 [S, vocabulary], whose last axis is contiguous. rows: ROW [S], no slot twice. masks: uint32
        [vocabulary / 32 or more] each, a bit a token. history: int32 [slots, width]; where a row has penalties its
        token is written at place `history`. last: int64 [slots], where every row's token is written. Returns int64 [S].
        The host does not wait, and may change its arrays at once."""
        ...

    def logprobs(self, logits: torch.Tensor, ids: torch.Tensor, rows: np.ndarray, most: int) -> torch.Tensor | None:
        """Of some rows (int [R]) of the model's own logits and the ids chosen of all rows: int64 [R, 2 + 2 most], of
        each the bits of the chosen one's log-probability (float64), its rank, the likeliest ids, and the bits of their
        log-probabilities, right to 1e-6. None where plain torch has to."""
        ...
