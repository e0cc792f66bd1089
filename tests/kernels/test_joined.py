"""Float planes next to each other: the same numbers, one tensor."""

from __future__ import annotations

import torch

from multitensor.formats.quant_types import quant_type
from multitensor.kernels.cuda.joined import join_planes, joined_plane
from multitensor.kernels.quant_tensor import QuantTensor


def matrix(rows: int, cols: int, dtype: torch.dtype = torch.float16) -> QuantTensor:
    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    return QuantTensor(quant_type(names[dtype]), rows, cols, {"weight": torch.randn(rows, cols).to(dtype)})


def test_planes_become_views_of_one() -> None:
    weights: dict[str, QuantTensor | torch.Tensor] = {"q": matrix(12, 64), "k": matrix(4, 64), "v": matrix(8, 64)}
    before = {name: w.planes["weight"].clone() for name, w in weights.items() if isinstance(w, QuantTensor)}
    group = [w for w in weights.values() if isinstance(w, QuantTensor)]
    assert joined_plane(group) is None
    join_planes(weights, [("q", "k", "v")])
    group = [w for w in weights.values() if isinstance(w, QuantTensor)]
    whole = joined_plane(group)
    assert whole is not None and torch.equal(whole, torch.cat(list(before.values())))
    assert all(torch.equal(w.planes["weight"], before[name]) for w, name in zip(group, before, strict=True))
    assert joined_plane(group[:2]) is not None and joined_plane(group[1:]) is not None
    assert joined_plane([group[1], group[0]]) is None and joined_plane([group[0], group[2]]) is None


def test_what_does_not_belong_together_stays() -> None:
    for other in (matrix(4, 32), matrix(4, 64, torch.bfloat16), torch.zeros(4)):
        weights: dict[str, QuantTensor | torch.Tensor] = {"gate": matrix(4, 64), "up": other}
        join_planes(weights, [("gate", "up"), ("gate", "missing")])
        assert weights["up"] is other
