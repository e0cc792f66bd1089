"""Tiled weights on a GPU: every type, cut anywhere, against the planes' own numbers in float64."""

from __future__ import annotations

import pytest
import torch
from tiled_weights import error, weight

from multitensor.kernels.cuda.joined import join_tiles, tile_runs
from multitensor.kernels.cuda.tiles import TILE_BYTES, TiledTensor
from multitensor.kernels.quant_tensor import QuantTensor

pytestmark = pytest.mark.gpu
CUTS = [(40, 1024, 0, 1024), (264, 2048, 96, 96 + 1184), (2048, 4096, 0, 4096)]


@pytest.fixture(scope="module")
def kernels():
    from multitensor.kernels.cuda.matrix import TileKernels

    return TileKernels(torch.device("cuda:0"))


@pytest.mark.parametrize("name", TILE_BYTES)
@pytest.mark.parametrize("cut", CUTS)
def test_expansion_is_bit_for_bit(kernels, name: str, cut: tuple[int, int, int, int]) -> None:
    tiled, numbers = weight(name, *cut)
    assert torch.equal(kernels.expand(tiled, torch.float32), numbers)
    assert torch.equal(kernels.expand(tiled, torch.float32, 16, 17), numbers[16:33])
    assert torch.equal(kernels.expand(tiled, torch.bfloat16), numbers.bfloat16())
    ids = torch.tensor([0, 39, 17, 17, 5], device="cuda")
    assert torch.equal(kernels.gather(tiled, ids, torch.float32), numbers[ids])


@pytest.mark.parametrize("name", TILE_BYTES)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products(kernels, name: str, cut: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Activations are 16-bit integers: errors far below 2e-3."""
    tiled, numbers = weight(name, *cut)
    for tokens in (1, 2, 3, 4):
        x = torch.randn(tokens, tiled.cols, device="cuda", dtype=dtype)
        bias = torch.randn(tiled.rows, device="cuda")
        wanted = x.double() @ numbers.double().T
        found = kernels.multiply(x, [tiled], float_out=True)
        assert error(found, wanted) < 1e-4
        rounded = kernels.multiply(x, [tiled], bias)
        assert error(rounded, wanted + bias) < 5e-3


def test_three_matrices_of_two_types(kernels) -> None:
    parts = [
        weight("Q4_K", 512, 2048, 0, 2048, 1),
        weight("Q4_K", 96, 2048, 0, 2048, 2),
        weight("Q6_K", 96, 2048, 0, 2048, 3),
    ]
    x = torch.randn(3, 2048, device="cuda", dtype=torch.float16)
    bias = torch.randn(704, device="cuda")
    found = kernels.multiply(x, [tiled for tiled, _ in parts], bias, float_out=True)
    wanted = x.double() @ torch.cat([numbers for _, numbers in parts]).double().T + bias
    for columns in (slice(0, 512), slice(512, 608), slice(608, 704)):
        assert error(found[:, columns], wanted[:, columns]) < 1e-4


@pytest.mark.parametrize("types", [("Q4_K", "Q4_K"), ("Q5_0", "Q8_0")])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [256, 4096])
def test_gated(kernels, types: tuple[str, str], kind: str, rows: int) -> None:
    (gate, g), (up, u) = (weight(name, rows, 1024, 0, 1024, seed) for seed, name in enumerate(types))
    x = torch.randn(2, 1024, device="cuda", dtype=torch.bfloat16)
    scale = float((x.double() @ g.double().T).std())
    wanted_gate = x.double() @ g.double().T
    act = (
        torch.nn.functional.silu(wanted_gate)
        if kind == "silu"
        else torch.nn.functional.gelu(wanted_gate, approximate="tanh")
    )
    wanted = act * (x.double() @ u.double().T)
    found = kernels.multiply(x, [gate, up], gated=kind)
    assert scale > 0
    assert error(found, wanted) < 6e-3


@pytest.mark.parametrize("name", TILE_BYTES)
def test_embedding_is_bit_for_bit(kernels, name: str) -> None:
    """Rows by id, by what a slot sampled last, and of other ranks."""
    tiled, numbers = weight(name, 40, 768, 0, 768)
    ids = torch.tensor([107, 100, -1, 139, 99, 140, -1, 116], dtype=torch.int32, device="cuda")
    slots = torch.tensor([0, 1, 2, 0, 0, 0, 1, 0], dtype=torch.int32, device="cuda")
    last = torch.tensor([5, 123, 108], device="cuda")
    found = kernels.embed(tiled, ids, slots, last, first=100, scale=0.75)
    rows = [7, 0, 8, 39, None, None, 23, 16]
    wanted = torch.stack([torch.zeros(768, device="cuda") if r is None else numbers[r] * 0.75 for r in rows])
    assert torch.equal(found, wanted)


def test_embeddings_of_a_prompt(kernels) -> None:
    """Many more than a decode step has."""
    tiled, numbers = weight("Q4_K", 1000, 768, 0, 768)
    ids = torch.randint(0, 1100, (3000,), device="cuda", dtype=torch.int32)
    found = kernels.embed(tiled, ids, ids, torch.zeros(1, dtype=torch.int64, device="cuda"), first=0, scale=1.0)
    places = ids.long().clamp(max=999)
    assert torch.equal(found, torch.where((ids < 1000).unsqueeze(1), numbers[places], 0.0))


def test_matrices_whose_tiles_follow_one_another(kernels) -> None:
    """Expanded at once: the same numbers."""
    made = [weight(name, rows, 512, 0, 512, seed=rows) for name, rows in (("Q4_K", 96), ("Q4_K", 40), ("Q6_K", 48))]
    weights: dict[str, QuantTensor | torch.Tensor] = {str(i): tiled for i, (tiled, _) in enumerate(made)}
    join_tiles(weights, [("0", "1", "2")])
    joined = [w for w in weights.values() if isinstance(w, TiledTensor)]
    assert [rows for _, rows in tile_runs(joined)] == [136, 48]
    for dtype in (torch.float16, torch.float32):
        apart = torch.cat([kernels.expand(tiled, dtype) for tiled, _ in made])
        assert torch.equal(kernels.expand_joined(joined, dtype), apart)
