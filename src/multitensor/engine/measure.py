"""What a rank's device can do: how fast its memory is read, what the reductions of a decode step cost by themselves.

Every rank measures at the same time, so that CPU ranks share their memory as they do at work. All functions are
collective. Imported by ranks only: it imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from multitensor.engine.runner import ModelRunner

GPU_READ_BYTES = 2 << 30
LEAST_GPU_READ_BYTES = 256 << 20  # a smaller read would say more about the L2 cache
CPU_READ_BYTES = 256 << 20
READS = 8
REPEATS = 5


@torch.inference_mode()
def measure(runner: ModelRunner, batches: Sequence[int]) -> dict[str, Any]:
    """memory_bytes_per_second: of the best of some reads of an array, by torch.sum; None where there is no room for it.
    reduction_seconds: by number of sequences, all the reductions of one decode step, see `reduction_seconds`."""
    runner.group.barrier()
    bandwidth = _gpu_bandwidth(runner.device) if runner.device.type == "cuda" else _cpu_bandwidth()
    return {
        "memory_bytes_per_second": bandwidth,
        "reduction_seconds": {batch: reduction_seconds(runner, batch) for batch in batches},
    }


def _gpu_bandwidth(device: torch.device) -> float | None:
    free, _ = torch.cuda.mem_get_info(device)
    nbytes = min(GPU_READ_BYTES, free // 2)
    if nbytes < LEAST_GPU_READ_BYTES:
        return None
    try:
        x = torch.empty(nbytes // 4, dtype=torch.float32, device=device).normal_()
    except torch.cuda.OutOfMemoryError:  # a cap of the plan's, below what is free
        return None
    seconds = _gpu_seconds(x.sum, READS, device)
    del x
    torch.cuda.empty_cache()
    return nbytes // 4 * 4 / seconds


def _cpu_bandwidth() -> float:
    x = torch.ones(CPU_READ_BYTES // 4, dtype=torch.float32)
    return CPU_READ_BYTES / _cpu_seconds(x.sum, READS)


def reduction_seconds(runner: ModelRunner, batch: int) -> float:
    """Seconds of a decode step's sums over ranks, two a layer and the embedding's, back to back: with nothing between
    them and no rank waiting for a slower one's arithmetic. On a GPU from one CUDA graph, as in a decode step, and with
    the norm after each sum where one launch does both."""
    if runner.group.size == 1:
        return 0.0
    partial = torch.zeros(batch, runner.plan.spec.hidden_size, dtype=torch.float32, device=runner.device)
    residual, out = torch.zeros_like(partial), torch.zeros_like(partial, dtype=runner.dtype)
    weight = torch.ones(partial.shape[1], device=runner.device)
    fused = runner.group.fuses(partial, residual)
    count = 2 * runner.plan.spec.n_layers + 1

    def reduce() -> None:
        for _ in range(count):
            if fused:
                runner.group.reduce_add_norm_into(partial, residual, weight, 1e-5, out)
            else:
                runner.group.all_reduce(partial)

    if runner.device.type == "cpu":
        runner.group.barrier()
        return _cpu_seconds(reduce, REPEATS)
    reduce()
    torch.cuda.synchronize(runner.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        reduce()
    runner.group.barrier()
    seconds = _gpu_seconds(graph.replay, REPEATS, runner.device)
    del graph
    return seconds


def _cpu_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Of the fastest of some calls, after one that warms up."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def _gpu_seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """As `_cpu_seconds`, by the device's clock."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 2)]
    for mark in marks[:-1]:
        mark.record()
        work()
    marks[-1].record()
    torch.cuda.synchronize(device)
    return min(first.elapsed_time(second) for first, second in pairwise(marks[1:])) / 1e3
