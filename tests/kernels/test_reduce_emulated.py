"""Sums and gathers over ranks (reduce.cu) on emulated GPUs of changing speeds: pushed into every reader's buffer, and
through mailboxes. Kernel, defines and arguments are those that a GPU gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulated_cuda
import pytest
import torch

from multitensor.kernels.cuda import program, reduce
from multitensor.kernels.cuda.reduce import PeerGather, PeerReduction
from multitensor.parallel.rank_memory import NOTHING

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
EPS = 1e-5
TOKENS = 3
LAUNCHES = 11
WAYS = pytest.mark.parametrize("mailbox", [False, True], ids=["pushed", "mailboxes"])


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> emulated_cuda.Queue:
    made = emulated_cuda.Queue(tmp_path)
    emulated_cuda.replace_gpu(monkeypatch, made, reduce)
    return made


def memories(size: int, nbytes: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The table of every rank's buffer or mailbox, and what keeps them."""
    own = [torch.full((nbytes // 4,), NOTHING, dtype=torch.int32) for _ in range(size)]
    return torch.tensor([buffer.data_ptr() for buffer in own]), own


def check_sums(queue: emulated_cuda.Queue, size: int, mailbox: bool, seed: int) -> bool:
    """Launches of one to three rows; False: somebody waits for ever, or a sum is wrong."""
    hidden = 264
    places, kept = memories(size, PeerReduction.nbytes(size, hidden, TOKENS, mailbox=mailbox))
    random = torch.Generator().manual_seed(seed)
    ranks = [PeerReduction(places, rank, hidden, TOKENS, mailbox=mailbox) for rank in range(size)]
    weight, post = 1 + torch.rand(2, hidden, generator=random)
    cases = []
    for i in range(LAUNCHES):
        shape = (1 + int(torch.randint(0, TOKENS, (1,), generator=random)), hidden)
        parts = torch.randn(size, *shape, generator=random)
        parts[:, :, i % 5 :: 7] = -0.0  # a sum that is exactly zero must arrive
        residual = torch.randn(shape, generator=random)
        outs = [torch.full(shape, float("nan"), dtype=torch.float16) for _ in ranks]
        cases.append((parts, residual, [residual.clone() for _ in ranks], outs, post if i % 3 == 0 else None))
    for rank, own in enumerate(ranks):
        for parts, _, residuals, outs, post_weight in cases:
            own.reduce_add_norm(parts[rank], residuals[rank], weight, EPS, outs[rank], post_weight=post_weight)
    if not queue.run(size, seed):
        return False
    assert len(kept) == size
    right = True
    for parts, before, residuals, outs, post_weight in cases:
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        if post_weight is not None:
            total = (total.double() * torch.rsqrt(total.double().square().mean(-1, keepdim=True) + EPS)).float()
            total *= post_weight
        wanted = before + total
        norm = wanted * torch.rsqrt(wanted.square().mean(-1, keepdim=True) + EPS) * weight
        for residual, out in zip(residuals, outs, strict=True):
            near = torch.allclose(residual, wanted, rtol=1e-5, atol=1e-5)
            right &= near if post_weight is not None else torch.equal(residual, wanted)
            right &= torch.allclose(out.float(), norm, rtol=2e-3, atol=2e-3)
            right &= torch.equal(residual, residuals[0]) and torch.equal(out, outs[0])
    return right


@WAYS
@pytest.mark.parametrize("size", [2, 3, 5])
def test_sums_in_rank_order_and_their_norms(queue: emulated_cuda.Queue, size: int, mailbox: bool) -> None:
    for seed in range(2):
        assert check_sums(queue, size, mailbox, seed)


def check_gathers(queue: emulated_cuda.Queue, sizes: tuple[int, ...], mailbox: bool, seed: int) -> bool:
    places, kept = memories(len(sizes), PeerGather.nbytes(sizes, TOKENS, mailbox=mailbox))
    random = torch.Generator().manual_seed(seed)
    ranks = [PeerGather(places, rank, sizes, TOKENS, mailbox=mailbox) for rank in range(len(sizes))]
    cases = []
    for i in range(LAUNCHES):
        rows = 1 + i * i % TOKENS
        parts = [torch.randn(rows, columns, generator=random) for columns in sizes]
        for part in parts:
            part[:, ::11] = -0.0
        cases.append((parts, [torch.full((rows, sum(sizes)), float("nan")) for _ in sizes]))
    for rank, own in enumerate(ranks):
        for parts, outs in cases:
            own.gather(parts[rank], outs[rank])
    if not queue.run(len(sizes), seed):
        return False
    assert len(kept) == len(sizes)
    return all(torch.equal(out, torch.cat(parts, dim=1)) for parts, outs in cases for out in outs)


@WAYS
@pytest.mark.parametrize("sizes", [(200, 130), (70, 1, 300), (40, 1, 99, 3, 60)], ids=str)
def test_gathers(
    queue: emulated_cuda.Queue, sizes: tuple[int, ...], mailbox: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduce, "_GATHER_THREADS", 32)
    monkeypatch.setattr(reduce, "_GATHER_ITEMS", 2)  # blocks of 64 columns, so that some need no other rank's
    for seed in range(2):
        assert check_gathers(queue, sizes, mailbox, seed)


POLL = "    Patience patience;\n    float post_squares"
FAULTS = {
    "clears before it has read": (POLL, "    put4(own + row_of(old, rank, token) + 16 * start, nothings);\n" + POLL),
    "never clears": ("if (at < stop) put4(own + row_of(old, rank, token) + 16 * at, nothings);", ""),
    "does not wait for all": ("complete &= here4(got[g][r]);", "complete &= r > 0 || here4(got[g][r]);"),
    "gathers with three sets": ("SETS = 4;", "SETS = 3;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_finds_faults(fault: str, queue: emulated_cuda.Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = FAULTS[fault]
    written = program.source_text

    def faulty(*what: Any) -> str:
        text = written(*what)
        assert good in text
        return text.replace(good, bad)

    monkeypatch.setattr(emulated_cuda, "source_text", faulty)
    monkeypatch.setattr(reduce, "_GATHER_THREADS", 32)
    monkeypatch.setattr(reduce, "_GATHER_ITEMS", 1)
    if "gathers" in fault:
        assert not all(check_gathers(queue, (64, 96, 1), True, seed) for seed in range(12))
    else:
        assert not all(check_sums(queue, 3, True, seed) for seed in range(12))


def test_every_rank_needs_a_column_in_mailboxes() -> None:
    with pytest.raises(ValueError, match="every rank needs one"):
        PeerGather(torch.zeros(2, dtype=torch.int64), 0, (10, 0), 1, mailbox=True)
