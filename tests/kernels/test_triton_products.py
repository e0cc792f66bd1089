"""Triton's products and expansion of every quantised type, at cuts with any phase, against float64 and the planes' own
formulas."""

from __future__ import annotations

import pytest
import torch
from random_weights import QUANTISED, oracle, random_raw, slice_of
from triton_here import DEVICE, INTERPRETED, MARKS, TOLERANCE, relative_error

from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.triton import products
from multitensor.kernels.triton.weights import LAYOUTS

pytestmark = MARKS
ROWS, COLS = 21, 1280  # neither is a whole number of tiles
SMALLEST_NORMAL = 2.0**-126


def cut(name: str, start_units: int, scale: float | None = 0.05) -> tuple[QuantTensor, torch.Tensor]:
    """Random weights without so many units at their beginning and one at their end, and their numbers, float64."""
    type = QUANT_TYPES[name]
    raw = random_raw(type, ROWS, COLS, seed=1, scale=scale)
    start, stop = start_units * type.cut_unit, COLS - type.cut_unit
    numbers = torch.from_numpy(oracle(type, raw)[:, start:stop].astype("float64"))
    return slice_of(type, raw, start, stop, device=DEVICE), numbers


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def test_every_type_with_kernels_is_known() -> None:
    assert sorted(LAYOUTS) == QUANTISED


@pytest.mark.filterwarnings("ignore:overflow")  # MXFP4's largest numbers are infinite
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("start_units", [0, 3])
def test_expansion_gives_the_very_numbers(name: str, start_units: int) -> None:
    w, numbers = cut(name, start_units, scale=None)
    got = products.expand(w, torch.float32)
    assert torch.equal(got, numbers.float().to(DEVICE)) or not INTERPRETED
    normal = numbers.abs() >= SMALLEST_NORMAL  # a GPU may take smaller numbers for zero
    assert torch.equal(got.cpu()[normal], numbers.float()[normal])
    assert (got.cpu()[~normal].abs() < SMALLEST_NORMAL).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_expansion_of_some_rows_in_halves(dtype: torch.dtype) -> None:
    w, _ = cut("Q6_K", 1)
    got = products.expand(w, dtype, slice(5, 30))
    assert got.dtype == dtype
    assert relative_error(got, dequantize(w, slice(5, 30))) < TOLERANCE[dtype]
    assert products.expand(w, dtype, slice(7, 7)).shape == (0, w.cols)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("tokens", [1, 3])
def test_products(name: str, tokens: int) -> None:
    w, numbers = cut(name, 3)
    x, bias = random(tokens, w.cols, seed=2), random(ROWS, seed=3)
    expected = x.cpu().double() @ numbers.T + bias.cpu().double()
    assert relative_error(products.multiply(x, w, bias), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "tokens"), [("Q4_K", 1), ("Q8_0", 2), ("Q4_K", 17), ("Q3_K", 64)])
def test_products_of_halves(name: str, tokens: int, dtype: torch.dtype) -> None:
    w, numbers = cut(name, 1)
    wide = random(tokens, w.cols + 8, seed=4, dtype=dtype)
    x = wide[:, : w.cols]  # rows that are not next to each other
    got = products.multiply(x, w)
    assert got.dtype == dtype
    assert relative_error(got, x.cpu().double() @ numbers.T) < TOLERANCE[dtype]


def test_what_it_does_not_take() -> None:
    w, _ = cut("Q4_K", 0)
    x = random(2, w.cols, seed=5)
    assert products.takes(x, w)
    assert not products.takes(x[:0], w)
    assert not products.takes(x.double(), w)
    gapped = {name: torch.cat((plane, plane), dim=1)[:, : plane.shape[1]] for name, plane in w.planes.items()}
    assert not products.takes(x, QuantTensor(w.type, w.rows, w.cols, gapped, w.phase))
    plain = QuantTensor(QUANT_TYPES["F32"], 2, 4, {"weight": random(2, 4, seed=6)})
    assert not products.takes(x, plain)
