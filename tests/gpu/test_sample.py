"""Greedy sampling on the device against argmax, many launches in a row."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("columns", [17, 5000, 128256, 262144])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_likeliest_is_remembered(columns: int, rows: int) -> None:
    from multitensor.kernels.cuda.sample import GreedySampler

    sampler = GreedySampler(rows, torch.device("cuda:0"))
    slots = torch.randperm(rows + 3, device="cuda")[:rows].int()
    positions = torch.arange(rows, device="cuda", dtype=torch.int32) - 1  # the first row is padding
    for launch in range(5):
        last = torch.full((rows + 3,), -7, dtype=torch.int64, device="cuda")
        logits = torch.randn(rows, columns, device="cuda")
        if launch == 3:  # equals: the lowest index counts
            logits = logits.round()
        if launch == 4:
            logits = -logits.abs() - 1e30
        sampler.run(logits, positions, slots, last)
        wanted = torch.tensor([int((row == row.max()).nonzero()[0]) for row in logits], device="cuda")
        assert torch.equal(sampler.ids, wanted)
        expected = torch.full_like(last, -7)
        expected[slots[1:].long()] = wanted[1:]
        assert torch.equal(last, expected)
