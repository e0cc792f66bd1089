"""Tables of cosines and sines of the rotary embeddings (arXiv:2104.09864), for all positions of a context."""

from __future__ import annotations

import torch

from multitensor.architectures.spec import RopeSpec

ROWS = 1024  # made at a time


class RopeTable:
    """cos, sin: float32 [context, R / 2]. Angles are float64, because float32 loses them at long contexts.

    A file may promise a context of millions of tokens that nobody ever fills. So only every ROWS-th row is worked out
    by itself, the rows that follow it by sums of angles that all pieces share; and on a CPU no row is made, nor its
    memory touched, before a position asks for it. On a GPU all are made at once: kernels read them by address.
    """

    def __init__(self, spec: RopeSpec, context: int, factors: torch.Tensor | None, device: torch.device) -> None:
        frequencies = torch.tensor(spec.inverse_frequencies, dtype=torch.float64)
        if spec.use_factors_tensor:
            if factors is None or factors.numel() != frequencies.numel():
                raise ValueError(f"rope_freqs.weight must hold {frequencies.numel()} factors")
            frequencies = frequencies / factors.to("cpu", torch.float64)
        self.style = spec.style
        self.cos = torch.empty(context, len(frequencies), dtype=torch.float32, device=device)
        self.sin = torch.empty_like(self.cos)
        self._frequencies = frequencies
        self._magnitude = spec.magnitude
        within = torch.outer(torch.arange(min(ROWS, context), dtype=torch.float64), frequencies)
        self._cos_within, self._sin_within = within.cos(), within.sin()
        self._made = 0  # rows
        if device.type != "cpu":
            self._make(context)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each float32 [T, R / 2], of int64 positions [T] below the context."""
        if self._made < len(self.cos) and positions.numel():
            self._make(int(positions.max()) + 1)
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)

    def _make(self, rows: int) -> None:
        """At least so many rows, in whole pieces: cos(a + b), sin(a + b) of the piece's first row and what follows."""
        while self._made < rows:
            stop = min(self._made + ROWS, len(self.cos))
            first = self._made * self._frequencies
            cos, sin = first.cos() * self._magnitude, first.sin() * self._magnitude
            cos_within, sin_within = self._cos_within[: stop - self._made], self._sin_within[: stop - self._made]
            self.cos[self._made : stop].copy_(cos * cos_within - sin * sin_within)
            self.sin[self._made : stop].copy_(sin * cos_within + cos * sin_within)
            self._made = stop
