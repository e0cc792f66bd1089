"""Products of many tokens in 8 bits (prefill.cu) on an emulated GPU, against plain torch."""

from __future__ import annotations

import math
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from test_cuda_many_tokens import PlainPrefill, PlainTiles

from multitensor.config import INT8_PROMPTS
from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels import reference
from multitensor.kernels.cuda import cuda_kernels, int8
from multitensor.kernels.cuda.cuda_kernels import CudaKernels
from multitensor.kernels.cuda.int8 import Int8Products, is_int8_possible
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.quant_tensor import QuantTensor

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16]
FLOAT_TYPES = {torch.float16: QUANT_TYPES["F16"], torch.bfloat16: QUANT_TYPES["BF16"]}


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> emulated_cuda.AtOnce:
    """One for all, since kernels take seconds to build."""
    return emulated_cuda.AtOnce(tmp_path_factory.mktemp("int8"))


@pytest.fixture(autouse=True)
def emulated(queue: emulated_cuda.AtOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_cuda.replace_gpu(monkeypatch, queue, int8)


def turned(x: torch.Tensor) -> torch.Tensor:
    """By Sylvester's construction, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (x.double().unflatten(-1, (-1, 64)) @ matrix / 8).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 2112])
def test_rows_of_integers(dtype: torch.dtype, columns: int) -> None:
    """Rows apart, one with an outlier, one of zeros; a row with NaN stays one."""
    every = torch.randn(6, columns + 8, generator=torch.Generator().manual_seed(columns)).to(dtype)
    x = every[:, :columns]
    x[1, 5] = 200.0
    x[2] = 0.0
    x[4, columns - 1] = float("nan")
    integers, scales = Int8Products(CPU, 1 << 20).quantise(x)
    assert integers.dtype == torch.int8 and integers.shape == x.shape
    sound = [0, 1, 2, 3, 5]
    wanted = turned(x[sound])
    found = integers[sound].double() * scales[sound].double().unsqueeze(1)
    assert torch.all((found - wanted).abs() <= 0.5001 * scales[sound].double().unsqueeze(1) + 1e-30)
    assert integers[[0, 1, 3, 5]].abs().amax(1).tolist() == [127] * 4
    assert scales[2] == 0 and not integers[2].any()
    assert scales[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scratch", [1 << 20, 60 << 10])
def test_products(dtype: torch.dtype, has_bias: bool, scratch: int) -> None:
    """All at once, or 16 rows of weights at a time, of which the last are fewer; with outliers of 40 times in x."""
    generator = torch.Generator().manual_seed(1)
    tokens, columns, rows = 21, 576, 48
    x = torch.randn(tokens, columns, generator=generator)
    x[:, 7] *= 40
    x, w = x.to(dtype), torch.randn(rows, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator) if has_bias else None
    ours = Int8Products(CPU, scratch)
    few = ours.rows_at_a_time(tokens, columns)
    assert few % 16 == 0 and (few >= rows) == (scratch == 1 << 20)
    found = ours.multiply(x, iter(w.split(few)), bias, rows)
    wanted = x.double() @ w.double().T + (0 if bias is None else bias.double())
    assert found.dtype == dtype and not found.isnan().any()
    error = ((found.double() - wanted).norm() / wanted.norm()).item()
    assert error < 0.02
    steps = x.double().abs().amax(1, keepdim=True) / 127
    unturned = (x.double() / steps).round() * steps @ w.double().T + (wanted - x.double() @ w.double().T)
    assert ((unturned - wanted).norm() / wanted.norm()).item() > 2 * error  # what the turn is for


@pytest.mark.parametrize(
    ("tokens", "columns", "rows", "dtype", "taken"),
    [
        (256, 128, (32, 16), torch.float16, True),
        (255, 128, (32, 16), torch.float16, False),
        (256, 96, (32, 16), torch.float16, False),
        (256, 128, (32, 8), torch.float16, False),
        (256, 128, (32, 0), torch.float16, False),
        (256, 128, (32, 16), torch.float32, False),
        (8192, 128, (32, 16), torch.bfloat16, False),  # the activations alone would fill the scratch
    ],
)
def test_what_it_takes(tokens: int, columns: int, rows: tuple[int, ...], dtype: torch.dtype, taken: bool) -> None:
    assert Int8Products(CPU, 1 << 20).takes(torch.empty(tokens, columns, dtype=dtype), rows) == taken


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiled", [False, True])
def test_the_models_products(dtype: torch.dtype, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value, gate and up of many tokens, over tiles or float rows; others stay as they are."""
    kernels = CudaKernels.__new__(CudaKernels)
    kernels.device, kernels.exact = CPU, False
    tiles = PlainTiles()
    kernels.tile_kernels = kernels.small_batch_kernels = tiles  # type: ignore[assignment]
    kernels.prefill_kernels = PlainPrefill()
    kernels.float_kernels = SimpleNamespace(takes=lambda x, w: False)  # type: ignore[assignment]
    monkeypatch.setattr(cuda_kernels, "EXPAND_BYTES", 130 << 10)
    monkeypatch.setattr(int8, "FEWEST_TOKENS", 32)
    kernels.try_out(frozenset([INT8_PROMPTS]))
    assert kernels.rounds_prompts and kernels.int8_products is not None
    sizes = [("Q4_K", 96), ("Q4_K", 32), ("Q6_K", 96)]
    if tiled:
        weights: list[QuantTensor] = [tiles.tiled(name, rows, 512, rows + i) for i, (name, rows) in enumerate(sizes)]
        numbers = [dequantize(tiles.planes[w.tiles.data_ptr()]) for w in weights]  # type: ignore[attr-defined]
    else:
        numbers = [torch.randn(rows, 512).to(dtype) for _, rows in sizes]
        weights = [QuantTensor(FLOAT_TYPES[dtype], *w.shape, {"weight": w}) for w in numbers]
    x, biases = (0.1 * torch.randn(33, 512)).to(dtype), [torch.randn(96), None, torch.randn(96)]
    few = kernels.int8_products.rows_at_a_time(*x.shape)
    assert 32 < few < 96  # some matrices come in parts
    wanted = [reference_product(x, w, bias) for w, bias in zip(numbers, biases, strict=True)]
    found = kernels.linears(x, weights, biases)
    # Random blocks of Q4_K have means far from zero, which a turn does not spread.
    limit = 0.04 if tiled else 0.02
    assert all(3e-3 < error_of(f, w) < limit for f, w in zip(found, wanted, strict=True))
    assert 3e-3 < error_of(kernels.joined_linear(x, weights, biases), torch.cat(wanted, dim=1)) < limit
    gated = kernels.gated_linear(x, weights[0], weights[2], "silu", biases[0], biases[2])
    assert error_of(gated, reference.gated_activation(wanted[0], wanted[2], "silu")) < 2 * limit
    exact = 2e-3 if dtype == torch.float16 else 1e-2
    assert error_of(kernels.linear(x, weights[0]), reference_product(x, numbers[0], None)) < exact
    short = kernels.linears(x[:20], weights, biases)
    assert all(error_of(f, w[:20]) < exact for f, w in zip(short, wanted, strict=True))


def reference_product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = x.double() @ w.double().T
    return product if bias is None else product + bias.double()


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_scratch_is_kept() -> None:
    for tokens, columns in ((2048, 4096), (4096, 8192), (8192, 8192)):
        few = Int8Products(CPU, 256 << 20).rows_at_a_time(tokens, columns)
        assert few >= 2048 and math.isclose(
            tokens * columns + few * (3 * columns + 4 * tokens), 256 << 20, rel_tol=0.01
        )


def test_older_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_int8_possible(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.warns(UserWarning, match=r"int8-prompts: cpu has compute capability 7\.5"):
        assert not is_int8_possible(CPU)
