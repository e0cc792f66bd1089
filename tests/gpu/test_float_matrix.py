"""Matrix-vector kernels for float weights against float64, on a real GPU."""

from __future__ import annotations

import pytest
import torch

from multitensor.kernels.cuda.float_matrix import FloatKernels, Shape

pytestmark = pytest.mark.gpu

TYPES = [torch.float16, torch.bfloat16]
ROUNDING = {torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.fixture(scope="module")
def kernels() -> FloatKernels:
    return FloatKernels(torch.device("cuda", torch.cuda.current_device()))


def poison(tokens: int, rows: int) -> None:
    """Leaves NaN where the allocator will put the result, so that an element not written shows."""
    torch.full((tokens, rows), float("nan"), dtype=torch.float32, device="cuda")


def check(kernels: FloatKernels, x: torch.Tensor, w: torch.Tensor) -> None:
    assert kernels.takes(x, w)
    wanted = x.double() @ w.double().T
    poison(len(x), len(w))
    found = kernels.multiply(x, w, float_out=True)
    assert found.dtype == torch.float32
    assert ((found - wanted).norm() / wanted.norm()).item() <= 2e-6 * max(1.0, x.shape[1] ** 0.5 / 16)
    poison(len(x), len(w))
    rounded = kernels.multiply(x, w)
    assert rounded.dtype == x.dtype
    assert ((rounded - wanted).norm() / wanted.norm()).item() <= ROUNDING[x.dtype]
    assert torch.equal(rounded, found.to(x.dtype))
    assert torch.equal(found, kernels.multiply(x, w, float_out=True)), "not deterministic"


def random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns, device="cuda").to(dtype)


@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("w_type", [*TYPES, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 1024), (1, 8), (7, 264), (1000, 4104), (2048, 40), (530, 14336)])
def test_products(
    kernels: FloatKernels, rows: int, columns: int, tokens: int, w_type: torch.dtype, x_type: torch.dtype
) -> None:
    check(kernels, random(tokens, columns, x_type), random(rows, columns, w_type))


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_activations_that_do_not_fit_shared_memory(kernels: FloatKernels, tokens: int) -> None:
    check(kernels, random(tokens, 40008, torch.bfloat16), random(300, 40008, torch.bfloat16))
    check(kernels, random(tokens, 28672, torch.float16), random(300, 28672, torch.float32))


@pytest.mark.parametrize("w_type", [*TYPES, torch.float32])
def test_slices_tails_and_odd_alignment(kernels: FloatKernels, w_type: torch.dtype) -> None:
    w = random(77, 1024, w_type)
    w[:, 900:] = float("nan")  # nothing beyond the slice may be touched
    for first, last in ((0, 512), (8, 808), (3, 800), (64, 777), (0, 1)):
        check(kernels, random(3, last - first, torch.float16), w[:, first:last])
    check(kernels, random(2, 512, torch.bfloat16)[1:], w[::3, :512])


@pytest.mark.parametrize("rows", [128256, 300000])
def test_a_vocabulary(kernels: FloatKernels, rows: int) -> None:
    check(kernels, random(8, 256, torch.bfloat16), random(rows, 256, torch.bfloat16))


@pytest.mark.parametrize("shape", [Shape(16, 1, 512), Shape(4, 2, 1024), Shape(16, 2, 256)])
def test_other_shapes_of_a_block(shape: Shape) -> None:
    kernels = FloatKernels(torch.device("cuda", torch.cuda.current_device()), shape)
    for rows, columns in ((4096, 4096), (1000, 264), (9, 16)):
        check(kernels, random(3, columns, torch.bfloat16), random(rows, columns, torch.bfloat16))


def test_a_chain_of_overlapping_launches(kernels: FloatKernels) -> None:
    """Each product reads what the one before wrote, while its weights load early; in a graph, as the engine runs it."""
    weights = [random(4096, 4096, torch.bfloat16) / 64 for _ in range(6)]
    x = random(2, 4096, torch.bfloat16)

    def chain() -> torch.Tensor:
        y = x
        for w in weights:
            y = kernels.multiply(y, w)
        return y

    wanted = x
    for w in weights:
        torch.cuda.synchronize()
        wanted = kernels.multiply(wanted, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()
        with torch.cuda.graph(graph, stream=stream):
            y = chain()
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted)


def test_what_is_not_taken(kernels: FloatKernels) -> None:
    w = random(8, 64, torch.float16)
    assert not kernels.takes(random(9, 64, torch.float16), w)
    assert not kernels.takes(random(1, 64, torch.float32), w)
    assert not kernels.takes(random(1, 8, torch.float16), w.T)
