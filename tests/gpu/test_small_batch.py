"""Products of tiled weights with 5 to 64 tokens: every type, cut anywhere, against the planes' numbers in float64."""

from __future__ import annotations

import pytest
import torch
from tiled_weights import error, weight

from multitensor.kernels.cuda.tiles import TILE_BYTES

pytestmark = pytest.mark.gpu
CUTS = [(40, 1024, 0, 1024), (264, 2048, 96, 96 + 1184), (2072, 4096, 0, 4096)]
TOKENS = (5, 8, 9, 16, 17, 31, 32, 33, 64)


@pytest.fixture(scope="module")
def kernels():
    from multitensor.kernels.cuda.small_batch import SmallBatchKernels

    return SmallBatchKernels(torch.device("cuda:0"))


def poison(kernels, *elements: int) -> None:
    """Fills the scratch, and the memory that results of so many elements will lie in, with NaN."""
    for workspace in kernels._workspaces.values():
        workspace.fill_(float("nan"))
    blocks = [
        torch.full((size * count,), 0xFF, dtype=torch.uint8, device="cuda") for count in elements for size in (2, 4)
    ]
    del blocks  # back to torch's allocator, which hands them out again


@pytest.mark.parametrize("name", TILE_BYTES)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products(kernels, name: str, cut: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Integers up to 2048 are exact in the product, the largest of Q6_K's are rounded to float16."""
    tiled, numbers = weight(name, *cut)
    for tokens in TOKENS:
        x = torch.randn(tokens, tiled.cols, device="cuda", dtype=dtype)
        bias = torch.randn(tiled.rows, device="cuda")
        wanted = x.double() @ numbers.double().T
        poison(kernels, wanted.numel())
        assert error(kernels.multiply(x, [tiled], float_out=True), wanted) < 4e-4
        assert error(kernels.multiply(x, [tiled], bias), wanted + bias) < 3e-3


@pytest.fixture(scope="module", params=["64 rows at a time", "a row group a warp", "little shared memory"])
def others(request):
    """What other GPUs, or other numbers of tokens, take."""
    from multitensor.kernels.cuda.small_batch import TOKEN_TILES, Shape, SmallBatchKernels

    device = torch.device("cuda:0")
    if request.param == "64 rows at a time":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("no wgmma")
        return SmallBatchKernels(device, wide=dict.fromkeys(TOKEN_TILES, Shape(16, 1)))
    made = SmallBatchKernels(device, dict.fromkeys(TOKEN_TILES, Shape(8, 1)), wide={})
    if request.param == "little shared memory":
        made.shared_limit = 99 << 10  # 64 tokens in two launches
    return made


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q2_K", "IQ4_XS"])
@pytest.mark.parametrize("cut", CUTS)
def test_products_of_others(others, name: str, cut: tuple[int, int, int, int]) -> None:
    tiled, numbers = weight(name, *cut)
    x = torch.randn(64, tiled.cols, device="cuda", dtype=torch.bfloat16)
    alone = None
    for tokens in TOKENS:
        assert others.takes([tiled], tokens)
        wanted = x[:tokens].double() @ numbers.double().T
        poison(others, wanted.numel())
        found = others.multiply(x[:tokens], [tiled], float_out=True)
        assert error(found, wanted) < 4e-4
        alone = found[:5] if alone is None else alone
        assert torch.equal(found[:5], alone)


@pytest.mark.parametrize("tokens", [7, 64])
def test_gate_and_up_of_others(others, tokens: int) -> None:
    (gate, g), (up, u) = (weight("Q4_K", 1040, 2048, 0, 2048, seed) for seed in (1, 2))
    x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    wanted = torch.nn.functional.silu(x.double() @ g.double().T) * (x.double() @ u.double().T)
    poison(others, tokens * 1040)
    assert error(others.multiply(x, [gate, up], gated="silu"), wanted) < 3e-3


@pytest.mark.parametrize("tokens", [5, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_that_a_norm_has_packed(kernels, tokens: int, dtype: torch.dtype) -> None:
    """The product takes them, and gives the bits that it gives of rows that it packs itself."""
    from multitensor.kernels.cuda.decode import DecodeKernels

    tiled, _ = weight("Q4_K", 520, 4096, 0, 4096)
    rows = torch.full((tokens, 4096), float("nan"), device="cuda", dtype=dtype)
    residual, partial = torch.randn(2, tokens, 4096, device="cuda")
    made = kernels.rows_beside(rows, [tiled])
    norm = torch.rand(4096, device="cuda") + 0.5
    DecodeKernels(torch.device("cuda:0")).add_rms_norm(residual, partial, norm, 1e-5, rows, packed=made)
    wanted = kernels.multiply(rows, [tiled], float_out=True)
    with kernels.made_beside(made):
        found = kernels.multiply(rows, [tiled], float_out=True)
        rows.fill_(float("nan"))  # not looked at
        again = kernels.multiply(rows, [tiled], float_out=True)
    assert torch.equal(found, wanted) and torch.equal(again, wanted)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "Q2_K"])
def test_a_token_has_the_same_bits_in_any_company(kernels, name: str) -> None:
    tiled, _ = weight(name, 2072, 4096, 0, 4096)
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    alone = kernels.multiply(x[:5], [tiled], float_out=True)
    for tokens in TOKENS:
        assert torch.equal(kernels.multiply(x[:tokens], [tiled], float_out=True)[:5], alone)
    turned = x.roll(17, 0)
    assert torch.equal(kernels.multiply(turned, [tiled], float_out=True)[17:22], alone)


@pytest.mark.parametrize("tokens", [7, 24, 64])
def test_three_matrices_of_two_types(kernels, tokens: int) -> None:
    parts = [
        weight("Q4_K", 520, 2048, 0, 2048, 1),
        weight("Q4_K", 104, 2048, 0, 2048, 2),
        weight("Q6_K", 96, 2048, 0, 2048, 3),
    ]
    x = torch.randn(tokens, 2048, device="cuda", dtype=torch.float16)
    bias = torch.randn(720, device="cuda")
    poison(kernels, tokens * 720)
    found = kernels.multiply(x, [tiled for tiled, _ in parts], bias, float_out=True)
    wanted = x.double() @ torch.cat([numbers for _, numbers in parts]).double().T + bias
    for columns in (slice(0, 520), slice(520, 624), slice(624, 720)):
        assert error(found[:, columns], wanted[:, columns]) < 4e-4


@pytest.mark.parametrize("types", [("Q4_K", "Q4_K"), ("Q5_0", "Q8_0")])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [264, 4096])
@pytest.mark.parametrize("tokens", [6, 16, 32, 50])
def test_gated(kernels, types: tuple[str, str], kind: str, rows: int, tokens: int) -> None:
    (gate, g), (up, u) = (weight(name, rows, 1024, 0, 1024, seed) for seed, name in enumerate(types))
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(2 * rows, device="cuda")
    wanted_gate = x.double() @ g.double().T + bias[:rows]
    act = (
        torch.nn.functional.silu(wanted_gate)
        if kind == "silu"
        else torch.nn.functional.gelu(wanted_gate, approximate="tanh")
    )
    wanted = act * (x.double() @ u.double().T + bias[rows:])
    poison(kernels, tokens * rows)
    assert error(kernels.multiply(x, [gate, up], bias, gated=kind), wanted) < 3e-3


def test_numbers_far_apart(kernels) -> None:
    """Tokens next to float16's largest number, tiny ones, zeros, and what bfloat16 holds beyond float16."""
    tiled, numbers = weight("Q4_K", 264, 1024, 0, 1024)
    for dtype, large in ((torch.float16, 6e4), (torch.bfloat16, 1e30)):
        x = torch.randn(6, 1024, device="cuda").mul_(1e-4).to(dtype)
        x[0, 5] = large
        x[1] = 0
        found = kernels.multiply(x, [tiled], float_out=True)
        wanted = x.double() @ numbers.double().T
        assert not found[1].any()
        for token in (0, 2, 3, 4, 5):
            assert error(found[token], wanted[token]) < 1e-4


def test_replayed_in_a_graph(kernels) -> None:
    """Counters and workspace are left as they were found: a second replay gives the same."""
    (gate, _), (up, _) = (weight("Q4_K", 264, 2048, 0, 2048, seed) for seed in (1, 2))
    down, _ = weight("Q6_K", 2048, 256, 0, 256, 3)
    x = torch.randn(24, 2048, device="cuda", dtype=torch.float16)

    def step() -> torch.Tensor:
        inner = kernels.multiply(x, [gate, up], gated="silu")
        return kernels.multiply(inner[:, :256], [down], float_out=True)

    wanted = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, wanted)
