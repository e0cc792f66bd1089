"""Products of 5 to 64 tokens with tiled weights in one pass (gemm.cu, activations.cu) on an emulated GPU, by float64.
Kernels, defines and arguments are those that a GPU gets."""

from __future__ import annotations

from pathlib import Path

import emulated_cuda
import pytest
import random_weights as rw
import torch
from random_weights import error

from multitensor.kernels.cuda import decode, small_batch
from multitensor.kernels.cuda.small_batch import TOKEN_TILES, Shape, SmallBatchKernels
from multitensor.kernels.cuda.tiles import TiledTensor

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
START, COLUMNS = 96, 480  # from inside a super-block to inside the last of three
SHAPES = {"a row group a warp": Shape(4, 1), "two": Shape(2, 2)}
WIDE = {"64 rows at a time": Shape(8, 1), "128": Shape(8, 2)}


@pytest.fixture(params=[*SHAPES, *WIDE])
def kernels(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallBatchKernels:
    emulated_cuda.replace_gpu(
        monkeypatch, emulated_cuda.AtOnce(tmp_path), small_batch, processors=5, shared_limit=227 << 10
    )
    shape, wide = SHAPES.get(request.param, SHAPES["two"]), WIDE.get(request.param)
    wide_shapes = {} if wide is None else dict.fromkeys(TOKEN_TILES, wide)
    return SmallBatchKernels(torch.device("cpu"), dict.fromkeys(TOKEN_TILES, shape), wide_shapes)


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


def test_panels_of_many_parts(kernels: SmallBatchKernels) -> None:
    """Blocks that share a panel of eight super-blocks of columns add up its parts together, gated or not."""
    (gate, gate_numbers), (up, up_numbers) = (rw.tiled("Q4_K", 40, 2048, 0, 2048, seed, 0.01) for seed in (11, 12))
    x = torch.randn(9, 2048, generator=torch.Generator().manual_seed(13)).to(torch.float16)
    products = [x.double() @ numbers.double().T for numbers in (gate_numbers, up_numbers)]
    assert error(kernels.multiply(x, [gate], float_out=True), products[0]) < 4e-4
    wanted = torch.nn.functional.silu(products[0]) * products[1]
    assert error(kernels.multiply(x, [gate, up], gated="silu"), wanted) < 3e-3
    assert not kernels._counters.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_that_a_norm_has_packed(
    dtype: torch.dtype, kernels: SmallBatchKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same operands as a launch of their own makes of the norm's result, and the product takes them."""
    weights, _ = rw.tiled("Q4_K", 72, 512, 0, 512, 9, 0.01)
    kernels.norms_pack = True
    monkeypatch.setattr(decode, "Program", emulated_cuda.Asked)
    monkeypatch.setattr(decode, "launch", small_batch.launch)
    random = torch.Generator().manual_seed(10)
    residual, partial = torch.randn(2, 7, 512, generator=random)
    weight, rows = torch.rand(512, generator=random) + 0.5, torch.empty(7, 512, dtype=dtype)
    made = kernels.rows_beside(rows, [weights])
    assert made is not None
    made.operands.zero_()
    decode.DecodeKernels(torch.device("cpu")).add_rms_norm(residual, partial, weight, 1e-5, rows, packed=made)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size, device=None, **kind: torch.zeros(*size, **kind))
        operands, scales = kernels._pack(rows, weights, 1, made.wide)
    assert torch.equal(scales[:7], made.scales[:7]) and torch.equal(operands, made.operands)
    with kernels.made_beside(made):
        kernels._pack = None  # type: ignore[assignment,method-assign]
        found = kernels.multiply(rows, [weights])
    del kernels._pack
    assert torch.equal(found, kernels.multiply(rows, [weights]))


def test_some_tokens_at_a_time(kernels: SmallBatchKernels) -> None:
    """Where shared memory has no room for all of them, in bits as if it had."""
    weights, _ = tiled("Q4_K", 72, 7)
    x = torch.randn(21, COLUMNS, generator=torch.Generator().manual_seed(8)).to(torch.float16)
    wanted = kernels.multiply(x, [weights])
    shape, together = kernels._shape([weights], 1)
    kernels.shared_limit = small_batch.shared_bytes([weights], shape.slots, 1, 2)
    assert together <= shape.slots and kernels.at_once([weights], 21) == 8
    assert kernels.takes([weights], 32) and not kernels.takes([weights], 33)
    assert torch.equal(kernels.multiply(x, [weights]), wanted)
    kernels.shared_limit -= 1
    assert not kernels.takes([weights], 5)
