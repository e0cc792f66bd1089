"""What GPUs compute of the chunks of large sums (chunks.cu), emulated, against torch's operations to the last bit."""

from __future__ import annotations

import math

import emulated_cuda
import pytest
import torch

from multitensor.kernels.cuda import chunks
from multitensor.kernels.cuda.chunks import ChunkKernels
from multitensor.parallel.wire import GROUP, TorchMath, WireName, decode, row_bytes

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
CPU = torch.device("cpu")
HALVES = [(wire, dtype) for wire in ("exact", "q8") for dtype in (torch.float16, torch.bfloat16)]
WAYS = pytest.mark.parametrize(("wire", "dtype"), [*HALVES, ("exact", torch.float32)], ids=str)
GUARD = 8  # numbers behind, which nobody may touch


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> emulated_cuda.Queue:
    return emulated_cuda.Queue(tmp_path_factory.mktemp("chunks"))


@pytest.fixture
def queue(built: emulated_cuda.Queue, monkeypatch: pytest.MonkeyPatch) -> emulated_cuda.Queue:
    emulated_cuda.replace_gpu(monkeypatch, built, chunks)
    monkeypatch.setattr(chunks, "_THREADS", 64)
    monkeypatch.setattr(chunks, "_BLOCKS", 2)
    return built


def numbers_of(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    found = torch.randn(count + GUARD, generator=random) * torch.exp(torch.randn(count + GUARD, generator=random))
    found[3::17] = 0.0
    found[GROUP : 2 * GROUP] = 0.0  # a whole group, whose scale is 0
    return found.to(dtype)


def rows_of(rows: int, length: int, wire: WireName, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """What other ranks would send."""
    packed = torch.empty(rows, row_bytes(wire, length, dtype), dtype=torch.uint8)
    TorchMath().pack(wire, numbers_of(rows * length, dtype, seed)[: rows * length], length, packed)
    return packed


def read(wire: WireName, packed: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What rows say. Where a scale is 0, codes may differ."""
    return torch.stack([decode(wire, row.view(1, -1), length, dtype)[0] for row in packed])


@WAYS
@pytest.mark.parametrize(
    ("rows", "length", "count"), [(1, 96, 96), (3, 160, 3 * 160), (3, 416, 2 * 416 + 5), (5, 32, 1)]
)
def test_packing(
    queue: emulated_cuda.Queue, wire: WireName, dtype: torch.dtype, rows: int, length: int, count: int
) -> None:
    numbers = numbers_of(count, dtype, rows)[:count]
    wanted = torch.full((rows, row_bytes(wire, length, dtype)), 77, dtype=torch.uint8)
    found = wanted.clone()
    TorchMath().pack(wire, numbers, length, wanted)
    ChunkKernels(2, CPU).pack(wire, numbers, length, found)
    assert queue.run(1, 1)
    assert torch.equal(read(wire, found, length, dtype), read(wire, wanted, length, dtype))


@WAYS
@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 0), (4, 2), (4, 3)])
@pytest.mark.parametrize(("own", "share"), [(True, False), (False, True), (False, False)])
def test_adding(
    queue: emulated_cuda.Queue, wire: WireName, dtype: torch.dtype, ranks: int, rank: int, own: bool, share: bool
) -> None:
    """own: this rank's part is a row. share: the sum is written as a row too."""
    length, count = 288, 281
    nbytes = row_bytes(wire, length, dtype)
    received = rows_of(ranks - 1, length, wire, dtype, 7)
    row = rows_of(1, length, wire, dtype, 9)[0] if own else None
    both = []
    for maths in (TorchMath(), ChunkKernels(ranks, CPU)):
        numbers, result = numbers_of(count, dtype, 5), torch.full((nbytes,), 77, dtype=torch.uint8)
        guard = numbers[count:].clone()
        maths.add(wire, numbers[:count], row, received, rank, length, result if share else None)
        if queue.launches:
            assert queue.run(1, 2)
        assert torch.equal(numbers[count:], guard)
        both.append((numbers, result))
    (wanted, wanted_row), (found, found_row) = both
    assert torch.equal(found, wanted)
    if share:
        assert torch.equal(*(read(wire, packed.view(1, -1), length, dtype) for packed in (found_row, wanted_row)))
    else:
        assert bool((found_row == 77).all())


@WAYS
@pytest.mark.parametrize("count", [0, 1, 30, 96])
def test_reading(queue: emulated_cuda.Queue, wire: WireName, dtype: torch.dtype, count: int) -> None:
    row = rows_of(1, 96, wire, dtype, 1)[0]
    wanted, found = numbers_of(count, dtype, 2), numbers_of(count, dtype, 2)
    TorchMath().unpack(wire, row, 96, wanted[:count])
    ChunkKernels(2, CPU).unpack(wire, row, 96, found[:count])
    assert queue.run(1, 3)
    assert torch.equal(found, wanted)


def test_what_is_not_finite_stays_so(queue: emulated_cuda.Queue) -> None:
    numbers = torch.ones(4 * GROUP, dtype=torch.float16)
    numbers[GROUP + 3], numbers[2 * GROUP + 5], numbers[3 * GROUP + 31] = math.inf, math.nan, -math.inf
    packed = torch.empty(1, row_bytes("q8", 4 * GROUP, torch.float16), dtype=torch.uint8)
    kernels, found = ChunkKernels(2, CPU), torch.zeros(4 * GROUP, dtype=torch.float16)
    kernels.pack("q8", numbers, 4 * GROUP, packed)
    assert queue.run(1, 1)
    TorchMath().unpack("q8", packed[0], 4 * GROUP, found)
    assert bool(found[:GROUP].isfinite().all()) and not bool(found[GROUP:].isfinite().any())


def test_numbers_that_lie_crookedly_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of four"):
        ChunkKernels(2, CPU).unpack("exact", torch.zeros(128, dtype=torch.uint8), 32, torch.zeros(40)[1:33])
