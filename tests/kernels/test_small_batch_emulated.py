"""Products of 5 to 64 tokens with tiled weights in one pass (gemm.cu, activations.cu) on an emulated GPU, by float64.
Kernels, defines and arguments are those that a GPU gets."""

from __future__ import annotations

from pathlib import Path

import emulated_cuda
import pytest
import random_weights as rw
import torch
from random_weights import error

from multitensor.kernels.cuda import small_batch
from multitensor.kernels.cuda.small_batch import TOKEN_TILES, Shape, SmallBatchKernels
from multitensor.kernels.cuda.tiles import TiledTensor

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
START, COLUMNS = 96, 480  # from inside a super-block to inside the last of three
SHAPES = {"a row group a warp": Shape(4, 1), "two": Shape(2, 2)}


@pytest.fixture(params=SHAPES)
def kernels(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallBatchKernels:
    emulated_cuda.replace_gpu(monkeypatch, emulated_cuda.AtOnce(tmp_path), small_batch, processors=5)
    return SmallBatchKernels(torch.device("cpu"), dict.fromkeys(TOKEN_TILES, SHAPES[request.param]))


def tiled(name: str, rows: int, seed: int, start: int = START) -> tuple[TiledTensor, torch.Tensor]:
    """Random weights and the numbers that they stand for, float64."""
    weights, numbers = rw.tiled(name, rows, 768, start, start + COLUMNS, seed, 0.01)
    return weights, numbers.double()


@pytest.mark.parametrize("types", [("Q4_K", "Q6_K"), ("Q5_K", "IQ4_XS"), ("Q8_0", "Q4_1"), ("Q2_K", "Q3_K")])
def test_products(types: tuple[str, str], kernels: SmallBatchKernels) -> None:
    """Two matrices whose rows do not fill their last groups; panels are cut over blocks."""
    parts = [tiled(types[0], 40, 1), tiled(types[1], 100, 2)]
    numbers = torch.cat([n for _, n in parts])
    random = torch.Generator().manual_seed(3)
    bias = torch.randn(140, generator=random)
    for tokens in (5, 8, 19):
        x = torch.randn(tokens, COLUMNS, generator=random).to(torch.float16)
        y = kernels.multiply(x, [w for w, _ in parts], bias, float_out=True)
        assert error(y, x.double() @ numbers.T + bias.double()) < 4e-4


def test_gate_and_up_and_any_company(kernels: SmallBatchKernels) -> None:
    """The same token has the same bits in any company."""
    (gate, gate_numbers), (up, up_numbers) = tiled("Q4_K", 72, 4), tiled("Q4_K", 72, 5)
    x = torch.randn(20, COLUMNS, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    found = [kernels.multiply(rows, [gate, up], gated="silu") for rows in (x, x[:6], x[3:])]
    wanted = torch.nn.functional.silu(x.double() @ gate_numbers.T) * (x.double() @ up_numbers.T)
    assert error(found[0], wanted) < 5e-3
    assert torch.equal(found[1], found[0][:6]) and torch.equal(found[2], found[0][3:])
