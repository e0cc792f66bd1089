"""A layer's reduction that has begun: rows that other work need not wait for."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Reduction:
    """Rows [n, hidden] on their way through the sum over ranks, the residual add and the norm (kernels/rows.py: Rows).

    Until `wait` the partial sums and the rows of the residual belong to it: nobody else reads or writes them, or begins
    another reduction of the same rows. shape, dtype: of the normalised rows.
    """

    def __init__(self, partial: torch.Tensor, residual: torch.Tensor, finish: Callable[[], torch.Tensor]) -> None:
        """finish: waits, adds to the residual in place, and returns the normalised rows. partial: held until then, or
        other work might get its memory while it is still read."""
        self.shape: tuple[int, ...] = tuple(partial.shape)
        self.dtype = partial.dtype
        self.residual = residual
        self._partial: torch.Tensor | None = partial
        self._finish: Callable[[], torch.Tensor] | None = finish
        self._normed: torch.Tensor | None = None

    @classmethod
    def done(cls, normed: torch.Tensor, residual: torch.Tensor) -> Reduction:
        """One that is over: its normalised rows and its residual."""
        return cls(normed, residual, lambda: normed)

    def wait(self) -> torch.Tensor:
        """The normalised rows, for whatever is queued from now on; `residual` is up to date then, too. Every rank waits
        in the order in which the reductions began."""
        if self._finish is not None:
            self._normed, self._finish, self._partial = self._finish(), None, None
        assert self._normed is not None
        return self._normed
