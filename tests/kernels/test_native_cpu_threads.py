"""The native CPU kernels' threads, alone and in company, and what they offer to ranks that share memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from native_levels import random
from random_weights import random_tensor

from multitensor.kernels.cpu.native import NativeKernels, load
from multitensor.kernels.quant_tensor import QuantTensor


@pytest.mark.parametrize("exact", [False, True])
def test_the_number_of_threads_changes_no_bit(exact: bool) -> None:
    w, _ = random_tensor("Q4_K", 999, 512, seed=14)
    results = []
    for threads in (1, 2, 5):
        made = load(threads=threads)
        assert made is not None
        results.append([made.linear(random(tokens, 512), w, exact=exact) for tokens in (1, 2, 64) for _ in range(20)])
        made.close()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_ranks_as_threads_do_not_disturb_each_other() -> None:
    w, _ = random_tensor("Q4_0", 700, 512, seed=17)
    inputs = [random(1, 512, seed=i) for i in range(3)]
    made = [load(threads=2) for _ in inputs]
    shared = made[0]
    assert shared is not None
    expected = [shared.linear(x, w) for x in inputs]
    wrong: list[int] = []

    def run(rank: int) -> None:
        for _ in range(150):
            for own in (made[rank], shared):
                assert own is not None
                if not torch.equal(own.linear(inputs[rank], w), expected[rank]):
                    wrong.append(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for own in made:
        assert own is not None
        own.close()
        own.close()


def _child(own: NativeKernels, x: torch.Tensor, w: QuantTensor, expected: torch.Tensor) -> None:
    sys.exit(0 if torch.equal(own.linear(x, w), expected) else 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_computes_alone() -> None:
    w, _ = random_tensor("Q4_0", 700, 512, seed=18)
    x = random(1, 512)
    own = load(threads=2)
    assert own is not None
    expected = own.linear(x, w)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(own, x, w, expected))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert torch.equal(own.linear(x, w), expected)
    own.close()


def test_a_process_ends_with_kernels_open() -> None:
    program = (
        "import torch; from multitensor.kernels.cpu.native import load; k = load(threads=3);"
        "k.rms_norm(torch.ones(400, 400), torch.ones(400), 1e-5); print('done')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "done\n" and result.stderr == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_take_no_signals() -> None:
    """So that Ctrl-C interrupts the thread that waits, and not one that cannot tell it."""

    def deaf_threads() -> int:
        masks = [
            next(line for line in status.read_text().splitlines() if line.startswith("SigBlk"))
            for status in Path("/proc/self/task").glob("*/status")
        ]
        return sum(int(mask.split()[1], 16) >> (signal.SIGINT - 1) & 1 for mask in masks)

    before = deaf_threads()
    own = load(threads=3)
    assert own is not None
    assert deaf_threads() == before + 2
    own.close()
    assert deaf_threads() == before
