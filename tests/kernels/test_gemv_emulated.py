"""Products of few tokens with tiled weights, and their expansion (gemv.cu), on an emulated GPU against float64. Kernel,
defines and arguments are those that a GPU gets."""

from __future__ import annotations

from pathlib import Path

import emulated_cuda
import pytest
import random_weights as rw
import torch
from random_weights import error

from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels.cuda import float_matrix, matrix, small_batch
from multitensor.kernels.cuda.cuda_kernels import CudaKernels
from multitensor.kernels.cuda.joined import join_tiles, tile_runs
from multitensor.kernels.cuda.matrix import TileKernels
from multitensor.kernels.cuda.tiles import TILE_BYTES, TiledTensor
from multitensor.kernels.quant_tensor import QuantTensor

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
# Matrices of one launch begin at the same column of a super-block, so types of blocks of 256 and of 32 do not meet.
LARGE, SMALL = (
    sorted(n for n in TILE_BYTES if (QUANT_TYPES[n].block_weights == 256) == large) for large in (True, False)
)
PAIRS = [pair for names in (LARGE, SMALL) for pair in zip(names, names[1:] + names[:1], strict=True)][::2]
START, COLUMNS = 32, 320  # from inside a super-block to inside the next


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> emulated_cuda.Queue:
    made = emulated_cuda.Queue(tmp_path)
    emulated_cuda.replace_gpu(monkeypatch, made, matrix)
    monkeypatch.setattr(matrix, "WARPS", 4)
    return made


def tiled(name: str, rows: int, seed: int, start: int = START) -> tuple[TiledTensor, torch.Tensor]:
    """Random weights and the numbers that they stand for, float64."""
    weights, numbers = rw.tiled(name, rows, 512, start, start + COLUMNS, seed, 0.01)
    return weights, numbers.double()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_products(pair: tuple[str, str], queue: emulated_cuda.Queue) -> None:
    """Two matrices of two types in one launch, whose rows do not fill their last groups."""
    parts = [tiled(pair[0], 40, 1), tiled(pair[1], 20, 2)]
    weights, numbers = [w for w, _ in parts], torch.cat([n for _, n in parts])
    random = torch.Generator().manual_seed(3)
    bias = torch.randn(60, generator=random)
    kernels = TileKernels(torch.device("cpu"))
    cases = [(torch.randn(t, COLUMNS, generator=random).to(torch.float16), t % 2 == 1) for t in (1, 2, 4)]
    found = [kernels.multiply(x, weights, bias if biased else None, float_out=True) for x, biased in cases]
    for y in found:
        y.fill_(float("nan"))
    assert queue.run(1, seed=1)
    for (x, biased), y in zip(cases, found, strict=True):
        assert error(y, x.double() @ numbers.T + (bias.double() if biased else 0)) < 1e-4


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_and_up(activation: str, queue: emulated_cuda.Queue) -> None:
    (gate, gate_numbers), (up, up_numbers) = tiled("Q4_K", 40, 4), tiled("Q6_K", 40, 5)
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    y = TileKernels(torch.device("cpu")).multiply(x, [gate, up], gated=activation)  # type: ignore[arg-type]
    assert queue.run(1, seed=2)
    inner = x.double() @ gate_numbers.T
    gelu = torch.nn.functional.gelu(inner, approximate="tanh")
    acted = gelu if activation == "gelu_tanh" else torch.nn.functional.silu(inner)
    assert error(y, acted * (x.double() @ up_numbers.T)) < 5e-3  # the result is a bfloat16


@pytest.mark.parametrize("name", ["Q5_0", "Q2_K", "IQ4_XS"])
def test_expansion_is_exact(name: str, queue: emulated_cuda.Queue) -> None:
    w, numbers = tiled(name, 40, 7)
    found = TileKernels(torch.device("cpu")).expand(w, torch.float32, 16)
    assert queue.run(1, seed=3)
    assert torch.equal(found, numbers[16:].float())


def test_matrices_whose_tiles_follow_one_another_are_expanded_at_once(
    queue: emulated_cuda.Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As query, key and value are, and gate and up: the same numbers in fewer launches."""
    at_once = emulated_cuda.AtOnce(queue.folder)
    monkeypatch.setattr(matrix, "launch", at_once.launch)
    made = [tiled(name, rows, 10 + rows) for name, rows in (("Q4_K", 48), ("Q4_K", 20), ("Q4_K", 16), ("Q6_K", 40))]
    weights: dict[str, QuantTensor | torch.Tensor] = {str(i): w for i, (w, _) in enumerate(made)}
    join_tiles(weights, [("0", "1", "2"), ("3", "missing")])
    joined = [w for w in weights.values() if isinstance(w, TiledTensor)]
    # The second ends within a group of rows, so that nothing may follow it.
    assert [count for _, count in tile_runs(joined)] == [68, 16, 40]
    assert [w.tiles.data_ptr() == before.tiles.data_ptr() for w, (before, _) in zip(joined, made, strict=True)] == [
        *(False, False, True, True)
    ]
    found = TileKernels(torch.device("cpu")).expand_joined(joined, torch.float32)
    assert torch.equal(found, torch.cat([numbers for _, numbers in made]).float())


def test_embeddings_of_here_of_elsewhere_and_of_the_last_token(queue: emulated_cuda.Queue) -> None:
    w, numbers = tiled("Q6_K", 40, 8, start=0)
    ids = torch.tensor([100, 139, -1, 99, 140], dtype=torch.int32)
    slots, last = torch.tensor([0, 0, 2, 0, 0], dtype=torch.int32), torch.tensor([0, 0, 117])
    found = TileKernels(torch.device("cpu")).embed(w, ids, slots, last, first=100, scale=2.0)
    assert queue.run(1, seed=4)
    nothing = torch.zeros(COLUMNS)
    wanted = [2 * numbers[0].float(), 2 * numbers[39].float(), 2 * numbers[17].float(), nothing, nothing]
    assert torch.equal(found, torch.stack(wanted))


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_a_prompts_embeddings_are_the_same_as_plain_torchs(
    name: str, queue: emulated_cuda.Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids below the rank's rows and above them are other ranks'."""
    emulated_cuda.replace_gpu(monkeypatch, queue, matrix, small_batch, float_matrix)
    w, numbers = tiled(name, 40, 9, start=0)
    ids = torch.randint(-40, 80, (150,), generator=torch.Generator().manual_seed(1))
    kernels = CudaKernels(torch.device("cpu"), exact=False)
    found = kernels.embedding(ids, w)
    assert queue.run(1, seed=5)
    here = (ids >= 0) & (ids < 40)
    assert 20 < int(here.sum()) < 130
    assert torch.equal(found, torch.where(here.unsqueeze(1), numbers[ids.clamp(0, 39)].float(), 0.0))
