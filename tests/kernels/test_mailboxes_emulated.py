"""The check of the host's memory (`mailboxes` of probe.cu) on emulated GPUs: what passes, and that it sees faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulated_cuda
import pytest
import torch

from multitensor.kernels.cuda import program
from multitensor.parallel.rank_memory import NOTHING

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
WORDS, ROUNDS, BLOCKS, THREADS = 150, 7, 2, 32


def verdicts(size: int, seed: int, folder: Path) -> list[list[int]]:
    """Of every rank: words that were wrong, words that did not come."""
    boxes = [torch.full((2 * WORDS,), NOTHING, dtype=torch.int32) for _ in range(size)]
    places = torch.tensor([box.data_ptr() for box in boxes])
    found = [torch.zeros(2, dtype=torch.int32) for _ in range(size)]
    queue = emulated_cuda.Queue(folder)
    kernel = emulated_cuda.Asked(("probe.cu",), {"EMULATED": 1}).kernel("mailboxes")
    for rank in range(size):
        queue.launch(kernel, BLOCKS, THREADS, 0, (places, found[rank], 5000, rank, size, WORDS, ROUNDS))
    assert queue.run(size, seed), "all wait for ever"
    return [verdict.tolist() for verdict in found]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_memory_that_works_passes(size: int, tmp_path: Path) -> None:
    assert verdicts(size, 1, tmp_path) == [[0, 0]] * size


FAULTS = {
    "none": ("letter(rank, round, i));", "letter(rank, round, i));"),
    "a word of another": ("letter(rank, round, i));", "letter(rank, round, i == 77 ? 78 : i));"),
    "a round that is not written": (
        "            put(boxes[rank]",
        "            if (round != 3 || i != 5) put(boxes[rank]",
    ),
    "a bit that sticks": ("letter(rank, round, i));", "letter(rank, round, i) | (rank == 1 ? 64 : 0));"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_memory_that_does_not_is_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = FAULTS[fault]
    written = program.source_text

    def faulty(*what: Any) -> str:
        text = written(*what)
        assert good in text
        # Time flies, so that a wait in vain ends.
        clock = "static u64 now_ = 0; now_ += 10000; now = now_; progress += now_ % 50000000 == 0;"
        return text.replace(good, bad).replace('asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));', clock)

    monkeypatch.setattr(emulated_cuda, "source_text", faulty)
    wrong, missing = (sum(counts) for counts in zip(*verdicts(3, 1, tmp_path), strict=True))
    assert (wrong > 0, missing > 0) == (fault in ("a word of another", "a bit that sticks"), "not written" in fault)
