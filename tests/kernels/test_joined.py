"""Float planes, or tiles, next to each other: the same numbers, one tensor."""

from __future__ import annotations

from dataclasses import replace

import torch
from random_weights import random_tensor

from multitensor.formats.quant_types import quant_type
from multitensor.kernels.cuda.joined import join_planes, join_tiles, joined_plane, tile_runs
from multitensor.kernels.cuda.tiles import TiledTensor, to_tiles
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


def tiled(name: str, rows: int, cols: int, phase: int = 0) -> TiledTensor:
    made = to_tiles(random_tensor(name, rows, cols, rows)[0])
    return replace(made, phase=phase)


def test_tiles_become_views_of_one() -> None:
    made = {"q": tiled("Q4_K", 48, 512), "k": tiled("Q4_K", 16, 512), "v": tiled("Q4_K", 20, 512)}
    before = {name: w.tiles.clone() for name, w in made.items()}
    weights: dict[str, QuantTensor | torch.Tensor] = {**made, "other": torch.zeros(3)}
    join_tiles(weights, [("q", "k", "v"), ("other", "missing")])
    group = [w for w in weights.values() if isinstance(w, TiledTensor)]
    assert all(torch.equal(w.tiles, before[name]) for w, name in zip(group, before, strict=True))
    assert [(first.rows, rows) for first, rows in tile_runs(group)] == [(48, 84)]
    assert [rows for _, rows in tile_runs(group[::-1])] == [20, 16, 48]
    assert [rows for _, rows in tile_runs([group[0], group[2]])] == [48, 20]


def test_tiles_that_are_not_one_matrix_stay() -> None:
    alike = tiled("Q4_K", 16, 512)
    others = tiled("Q6_K", 16, 512), tiled("Q4_K", 16, 256), tiled("Q4_K", 16, 512, phase=32)
    for first, other in [*((alike, other) for other in others), (tiled("Q4_K", 20, 512), alike)]:
        weights: dict[str, QuantTensor | torch.Tensor] = {"gate": first, "up": other}
        join_tiles(weights, [("gate", "up")])
        assert weights["gate"] is first and weights["up"] is other
