"""Rotary tables: the angles that the definition gives, and no work for positions that nobody asks for."""

from __future__ import annotations

import pytest
import torch

from multitensor.architectures.spec import RopeSpec
from multitensor.model.rope import ROWS, RopeTable

CPU = torch.device("cpu")
FREQUENCIES = tuple(1e6 ** (-i / 64) for i in range(64))


def spec(magnitude: float = 1.0, factors: bool = False) -> RopeSpec:
    return RopeSpec("half", FREQUENCIES, magnitude, factors)


def direct(positions: torch.Tensor, frequencies: torch.Tensor, magnitude: float) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(positions.double(), frequencies)
    return angles.cos() * magnitude, angles.sin() * magnitude


@pytest.mark.parametrize("context", [1, 7, ROWS, ROWS + 1, 5 * ROWS - 3, 1 << 20])
def test_every_position_has_the_cosine_and_sine_of_its_angle(context: int) -> None:
    table = RopeTable(spec(1.25), context, None, CPU)
    edges = [0, 1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS - 1, 4 * ROWS, context // 2, context - 1]
    positions = torch.tensor([p for p in edges if p < context])
    wanted = direct(positions, torch.tensor(FREQUENCIES, dtype=torch.float64), 1.25)
    for found, exact in zip(table.at(positions), wanted, strict=True):
        assert found.dtype is torch.float32
        assert (found - exact).abs().max() < 1.0e-7 * 1.25  # float32's own rounding, and little more


def test_order_of_asking_does_not_matter() -> None:
    near, far = torch.tensor([0, 5, 2 * ROWS]), torch.tensor([9 * ROWS + 17])
    upwards, downwards = RopeTable(spec(), 10 * ROWS, None, CPU), RopeTable(spec(), 10 * ROWS, None, CPU)
    first = upwards.at(near)[0], upwards.at(far)[0], upwards.at(near)[1]
    second = downwards.at(far)[0], downwards.at(near)[0], downwards.at(near)[1]
    assert torch.equal(first[0], second[1]) and torch.equal(first[1], second[0]) and torch.equal(first[2], second[2])


def test_factors_divide_the_frequencies() -> None:
    factors = torch.linspace(1, 8, len(FREQUENCIES))
    table = RopeTable(spec(factors=True), 4096, factors, CPU)
    positions = torch.tensor([3, 3000])
    wanted = direct(positions, torch.tensor(FREQUENCIES, dtype=torch.float64) / factors.double(), 1.0)
    assert (table.at(positions)[1] - wanted[1]).abs().max() < 1.0e-7
    with pytest.raises(ValueError, match="64 factors"):
        RopeTable(spec(factors=True), 4096, factors[:5], CPU)


def test_a_header_that_promises_a_vast_context_costs_neither_time_nor_memory() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    table = RopeTable(spec(), 1 << 22, None, CPU)  # 2 GiB of addresses
    table.at(torch.arange(2000))
    assert resident() - before < 64 << 20
