"""Rows of a matrix that come in parts, some of which may still be under way from other ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Rows(Protocol):
    """Rows [n, K] of a matrix. `wait` gives them: whatever is queued on the device after it finds them there. It may be
    called again, and gives the same. shape and dtype are known before."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def wait(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Here:
    """Rows that are there already."""

    rows: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def wait(self) -> torch.Tensor:
        return self.rows
