"""The launch between two attentions (layer.cu) by several ranks that share one GPU, a stream and some multiprocessors
each: parts of sums through each other's memory, and by mail through page-locked memory of the host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from layer_launches import CASES, Launches

from multitensor.kernels.cuda.matrix import TileKernels


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ranks > 1])
def test_launches_in_a_row(name: str) -> None:
    case = CASES[name]
    gpu = TileKernels(torch.device("cuda:0"))
    gpu.blocks //= 4 * case.ranks  # all ranks' blocks, and those that start early, must be resident at once
    launches = Launches(case, gpu)
    streams = [torch.cuda.Stream() for _ in launches.ranks]
    torch.cuda.synchronize()
    for i in range(launches.count):
        for number, (rank, stream) in enumerate(zip(launches.ranks, streams, strict=True)):
            with torch.cuda.stream(stream):
                if (i + number) % 3 == 0:
                    torch.cuda._sleep(200_000)
                launches.launch(rank, i)
    torch.cuda.synchronize()
    launches.check()
