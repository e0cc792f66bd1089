"""Tables of cosines and sines of the rotary embeddings (arXiv:2104.09864), made once for all positions of a context."""

from __future__ import annotations

import torch

from multitensor.architectures.spec import RopeSpec


class RopeTable:
    """cos, sin: float32 [context, R / 2]. Angles are float64, because float32 loses them at long contexts."""

    def __init__(self, spec: RopeSpec, context: int, factors: torch.Tensor | None, device: torch.device) -> None:
        frequencies = torch.tensor(spec.inverse_frequencies, dtype=torch.float64)
        if spec.use_factors_tensor:
            if factors is None or factors.numel() != frequencies.numel():
                raise ValueError(f"rope_freqs.weight must hold {frequencies.numel()} factors")
            frequencies = frequencies / factors.to("cpu", torch.float64)
        angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
        self.style = spec.style
        self.cos = (angles.cos() * spec.magnitude).to(device, torch.float32)
        self.sin = (angles.sin() * spec.magnitude).to(device, torch.float32)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each float32 [T, R / 2], of int64 positions [T] below the context."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)
