"""The launch between two attentions (layer.cu) on an emulated GPU: many in a row, on one rank and several whose speeds
differ, against float64. The kernel, its compilation's defines and its arguments are those that a GPU gets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from layer_launches import CASES, Launches

from multitensor.kernels.cuda import layer

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")


@pytest.mark.parametrize("name", CASES)
def test_launches_in_a_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    queue = emulated_cuda.Queue(tmp_path)
    emulated_cuda.replace_gpu(monkeypatch, queue, layer)
    gpu = SimpleNamespace(device=torch.device("cpu"), blocks=case.blocks, shared_limit=227 << 10, overlap=True)
    launches = Launches(case, gpu)
    for rank in launches.ranks:
        for i in range(launches.count):
            launches.launch(rank, i)
    assert queue.run(case.ranks, seed=1), "all wait for ever"
    launches.check()
