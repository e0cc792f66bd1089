"""How the CUDA kernels' Python side computes many tokens, with plain torch in the place of what needs a GPU."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from random_weights import random_tensor

from multitensor.kernels import reference
from multitensor.kernels.cuda import cuda_kernels
from multitensor.kernels.cuda.cuda_kernels import CudaKernels
from multitensor.kernels.cuda.matrix import TileKernels
from multitensor.kernels.cuda.tiles import ROWS, TiledTensor, to_tiles
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.quant_tensor import QuantTensor

HALF = torch.float16
TOKENS = 70  # more than any kernel for few tokens takes


class PlainTiles(TileKernels):
    """Expands by the planes' own numbers."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.planes: dict[int, QuantTensor] = {}
        self.expansions = 0

    def tiled(self, name: str, rows: int, cols: int, seed: int) -> TiledTensor:
        planes, _ = random_tensor(name, rows, cols, seed)
        tiled = to_tiles(planes)
        self.planes[tiled.tiles.data_ptr()] = planes
        return tiled

    def takes(self, weights: Any, tokens: int) -> bool:
        return False

    def _expand(
        self, w: TiledTensor, out: torch.Tensor, first: int, groups: int, rows: int, ids: torch.Tensor | None
    ) -> None:
        assert (
            ids is None and out.is_contiguous() and groups == -(-len(out) // ROWS) and rows == first * ROWS + len(out)
        )
        self.expansions += 1
        out.copy_(dequantize(self.planes[w.tiles.data_ptr()], slice(first * ROWS, rows)))


@pytest.fixture
def kernels() -> CudaKernels:
    made = CudaKernels.__new__(CudaKernels)
    made.device, made.exact = torch.device("cpu"), False
    made.tile_kernels = made.small_batch_kernels = PlainTiles()  # type: ignore[assignment]
    return made


def tiles_of(kernels: CudaKernels) -> PlainTiles:
    assert isinstance(kernels.tile_kernels, PlainTiles)
    return kernels.tile_kernels


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm()) < 2e-3


@pytest.mark.parametrize("scratch", [1 << 20, 48 * 512 * 2, 16 * 512 * 2])  # one part, two, five
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_matrix(kernels: CudaKernels, scratch: int, has_bias: bool) -> None:
    tiles = tiles_of(kernels)
    w = tiles.tiled("Q4_K", 72, 512, 1)
    x, bias = torch.randn(TOKENS, 512).to(HALF), torch.randn(72) if has_bias else None
    with patch.object(cuda_kernels, "EXPAND_BYTES", scratch):
        found = kernels.linear(x, w, bias)
    assert found.dtype == HALF and found.is_contiguous()
    assert tiles.expansions == -(-72 // (scratch // 1024))
    assert close(found, reference.linear(x.float(), tiles.planes[w.tiles.data_ptr()], bias))


@pytest.mark.parametrize("scratch", [1 << 20, 80 * 512 * 2])  # all in one product; one matrix after another
@pytest.mark.parametrize("has_bias", [False, True])
def test_matrices_that_share_their_input(kernels: CudaKernels, scratch: int, has_bias: bool) -> None:
    tiles = tiles_of(kernels)
    weights = [tiles.tiled(name, rows, 512, rows) for name, rows in (("Q4_K", 72), ("Q6_K", 40), ("Q4_K", 24))]
    x, biases = torch.randn(TOKENS, 512).to(HALF), [torch.randn(72), None, torch.randn(24)] if has_bias else None
    wanted = [
        reference.linear(x.float(), tiles.planes[w.tiles.data_ptr()], bias)
        for w, bias in zip(weights, biases or [None] * 3, strict=True)
    ]
    with patch.object(cuda_kernels, "EXPAND_BYTES", scratch):
        found = kernels.linears(x, weights, biases)
        joined = kernels.joined_linear(x, weights, biases)
    assert all(close(f, w) for f, w in zip(found, wanted, strict=True))
    assert close(joined, torch.cat(wanted, dim=1)) and joined.is_contiguous()
    shares = found[0].data_ptr() + 72 * 2 == found[1].data_ptr()
    assert shares == (scratch == 1 << 20)


def test_gate_and_up(kernels: CudaKernels) -> None:
    tiles = tiles_of(kernels)
    gate, up = tiles.tiled("Q4_K", 72, 512, 1), tiles.tiled("Q6_K", 72, 512, 2)
    x = (torch.randn(TOKENS, 512) * 0.01).to(HALF)
    g, u = (reference.linear(x.float(), tiles.planes[w.tiles.data_ptr()]) for w in (gate, up))
    found = kernels.gated_linear(x, gate, up, "silu")
    assert close(found, reference.gated_activation(g, u, "silu"))
