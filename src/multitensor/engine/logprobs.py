"""Log-probabilities of what was sampled: computed where the logits are, read by the host when the step ends.

Imported by ranks only: it imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from multitensor.engine.batch import TokenLogprobs


@dataclass(frozen=True)
class Logprobs:
    """Of R rows of a step. rows: int [R], their numbers. tops: int [R], how many of the likeliest each wants.

    packed: int64 [R, 2 + 2 k], k the most that any wants: of each row the bits of the chosen token's log-probability
    (float64), its rank, k ids, and the bits of their log-probabilities; one tensor, so that it is one copy.
    """

    rows: np.ndarray
    tops: np.ndarray
    packed: torch.Tensor

    def to_host(self) -> Logprobs:
        """The same in page-locked memory: a copy is queued on the device's stream; `read` is for when it is over."""
        host = torch.empty(self.packed.shape, dtype=torch.int64, pin_memory=True)
        return replace(self, packed=host.copy_(self.packed, non_blocking=True))

    def read(self) -> dict[int, TokenLogprobs]:
        """By row number; `packed` must be on the host."""
        numbers = self.packed.numpy()
        most = (numbers.shape[1] - 2) // 2
        values = numbers.view(np.float64)
        columns = (values[:, 0], numbers[:, 1], numbers[:, 2 : 2 + most], values[:, 2 + most :])
        lists = [self.rows.tolist(), self.tops.tolist(), *(column.tolist() for column in columns)]
        return {
            row: TokenLogprobs(value, best[:k], best_values[:k], rank)
            for row, k, value, rank, best, best_values in zip(*lists, strict=True)
        }


def pack_logprobs(logits: torch.Tensor, ids: torch.Tensor, most: int) -> torch.Tensor:
    """`Logprobs.packed` of float32 logits [R, vocabulary] and the chosen ids, int64 [R]. Waits for nothing.

    Ranks and the likeliest are those of the logits themselves, of which logarithms differ by one number a row, taken in
    float64.
    """
    whole = logits.double().logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, ids.unsqueeze(1))
    ranks = (logits > chosen).sum(-1, keepdim=True) + 1
    parts = [(chosen.double() - whole).view(torch.int64), ranks]
    if most:
        values, best = logits.topk(most)
        parts += [best, (values.double() - whole).view(torch.int64)]
    return torch.cat(parts, 1)
