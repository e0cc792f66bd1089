"""Every group against plain sums in rank order, over threads and over processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_fakes import run_forked

from multitensor.errors import RankFailed
from multitensor.kernels import reference
from multitensor.parallel.group import Group, SingleGroup
from multitensor.parallel.group_region import abort_group, create_group_region
from multitensor.parallel.local_group import LocalGroup
from multitensor.parallel.shared_memory_group import SharedMemoryGroup
from multitensor.parallel.shared_region import SharedRegion
from multitensor.parallel.torch_group import make_torch_group

Run = Callable[[int, Callable[[Group], Any]], list[Any]]
SLOT = 256 << 10


def run_threads(size: int, work: Callable[[Group], Any]) -> list[Any]:
    groups = LocalGroup.make(size)
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        results[rank] = work(groups[rank])

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def run_processes(size: int, work: Callable[[Group], Any]) -> list[Any]:
    region = create_group_region(size, SLOT)
    try:
        return run_forked(size, lambda rank: work(SharedMemoryGroup(SharedRegion(os.dup(region.fd)), rank)))
    finally:
        region.close()


def run_gloo(size: int, work: Callable[[Group], Any]) -> list[Any]:
    store = os.memfd_create("store")

    def one(rank: int) -> Any:
        group = make_torch_group(rank, size, torch.device("cpu"), f"/proc/self/fd/{store}", "gloo")
        result = work(group)
        group.barrier()
        group.close()
        return result

    try:
        return run_forked(size, one)
    finally:
        os.close(store)


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Numbers of many magnitudes, so that the order of a sum shows in its last bits."""
    generator = torch.Generator().manual_seed(1000 * rank + sum(shape))
    values = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-3, 3, shape, generator=generator)
    return values.to(dtype)


def rank_order_sum(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    total = part(0, shape, dtype).float()
    for rank in range(1, size):
        total = total + part(rank, shape, dtype).float()
    return total.to(dtype)


# Below a slot, above the size from which shares are summed, above a slot, odd lengths, nothing at all.
SHAPES = [(1,), (3, 576), (1, 0), (5, 8191), (7, 13001)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 5, 1, 7, 0, 2, 3), (4, 4, 4, 4, 4, 4, 4), (0, 30011, 2, 0, 5, 70001, 1)]


def use_everything(group: Group) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for turn in range(2):  # twice: both of a rank's slots, and cached views
        for shape in SHAPES:
            for dtype in DTYPES:
                found["sum", shape, dtype, turn] = group.all_reduce(part(group.rank, shape, dtype)).clone()
    found["ints"] = group.all_reduce(torch.tensor([2**40 + group.rank]))
    columns = part(group.rank, (4, 6), torch.float32).t()  # not contiguous
    found["columns"] = group.all_reduce(columns).clone()
    for sizes in SIZES:
        sizes = sizes[: group.size]
        for tokens in (0, 1, 3):
            mine = part(group.rank, (tokens, sizes[group.rank]), torch.float32)
            found["gather", sizes, tokens] = group.all_gather_last(mine, sizes)
    group.barrier()
    found["objects"] = group.gather_objects({"rank": group.rank, "words": "x" * (10 * group.rank)})
    return found


def check_everything(size: int, results: list[dict[Any, Any]]) -> None:
    for found in results:
        for key, value in found.items():
            if key[0] == "sum":
                assert torch.equal(value, rank_order_sum(size, key[1], key[2])), key
            elif key[0] == "gather":
                expected = torch.cat([part(r, (key[2], n), torch.float32) for r, n in enumerate(key[1])], dim=1)
                assert torch.equal(value, expected), key
        assert found["ints"].tolist() == [sum(2**40 + r for r in range(size))]
        assert torch.equal(found["columns"], rank_order_sum(size, (4, 6), torch.float32).t())
        assert found["objects"] == [{"rank": r, "words": "x" * (10 * r)} for r in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("run", [run_threads, run_processes])
def test_sums_and_gathers_equal_rank_order_bit_for_bit(run: Run, size: int) -> None:
    check_everything(size, run(size, use_everything))


def test_gloo_group() -> None:
    check_everything(2, run_gloo(2, use_everything))


def test_rank_order_matters_in_these_numbers() -> None:
    """Or the tests above could not tell one order from another."""
    forward = rank_order_sum(3, (7, 13001), torch.float32)
    backward = part(2, (7, 13001), torch.float32) + part(1, (7, 13001), torch.float32)
    backward = backward + part(0, (7, 13001), torch.float32)
    assert not torch.equal(forward, backward)


def test_many_reductions_stay_in_step() -> None:
    """More collectives than slots, with ranks that run ahead and fall behind."""

    def work(group: Group) -> list[float]:
        seen = []
        for i in range(300):
            if i % (7 + group.rank) == 0:
                time.sleep(0.0005)
            seen.append(float(group.all_reduce(torch.full((16,), float(i * (group.rank + 1))))[3]))
        return seen

    assert run_processes(3, work) == [[6.0 * i for i in range(300)]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("post_norm", [False, True])
def test_reduce_add_norm(dtype: torch.dtype, post_norm: bool) -> None:
    """Against the formula in float64."""
    weight, post_weight = part(100, (96,), torch.float32), part(101, (96,), torch.float32)
    residual = part(102, (5, 96), torch.float32)

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()

    def work(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        mine = residual.clone()
        post = post_weight if post_norm else None
        normed, kept = group.reduce_add_norm(part(group.rank, (5, 96), dtype), mine, weight, 1e-5, post)
        assert kept is mine
        return normed, kept

    results = run_threads(3, work)
    total = rank_order_sum(3, (5, 96), dtype).double()
    expected = residual.double() + (norm(total, post_weight) if post_norm else total)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for normed, kept in results:
        assert normed.dtype == dtype and kept.dtype == torch.float32
        torch.testing.assert_close(kept.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(normed.double(), norm(expected, weight), rtol=tolerance, atol=tolerance)
        assert torch.equal(normed, results[0][0]) and torch.equal(kept, results[0][1])


def test_single_group() -> None:
    group = SingleGroup()
    x = part(0, (2, 3), torch.float32)
    assert torch.equal(group.all_reduce(x), x)
    assert torch.equal(group.all_gather_last(x, [3]), x)
    assert group.gather_objects("only") == ["only"]
    normed, residual = group.reduce_add_norm(x, torch.zeros(2, 3), torch.ones(3), 1e-5)
    assert torch.equal(normed, reference.rms_norm(x, torch.ones(3), 1e-5)) and torch.equal(residual, x)


@pytest.mark.parametrize("run", [run_threads, run_processes])
def test_wrong_gather_sizes_are_refused(run: Run) -> None:
    def work(group: Group) -> str:
        with pytest.raises(ValueError, match="gathers"):
            group.all_gather_last(torch.zeros(2, 3), [3, 4] if group.rank else [2, 3])
        return "refused"

    assert run(2, work) == ["refused", "refused"]


def test_local_abort_reaches_all_with_its_reason() -> None:
    def work(group: Group) -> str:
        if group.rank == 1:
            group.abort("rank 1 had enough")
            return ""
        with pytest.raises(RankFailed) as caught:
            group.all_reduce(torch.ones(1))
        return str(caught.value)

    assert run_threads(3, work) == ["rank 1 had enough", "", "rank 1 had enough"]


def test_shared_memory_abort_ends_the_wait() -> None:
    def work(group: Group) -> float:
        if group.rank == 1:
            time.sleep(0.2)
            group.abort("rank 1 had enough")
            return 0.0
        begin = time.monotonic()
        with pytest.raises(RankFailed):
            group.all_reduce(torch.ones(1))
        return time.monotonic() - begin

    waited = run_processes(3, work)
    assert max(waited) < 2.0


def test_abort_from_outside_ends_the_wait() -> None:
    region = create_group_region(2)

    def work(rank: int) -> str:
        if rank == 1:
            time.sleep(0.1)
            abort_group(region)
            return ""
        group = SharedMemoryGroup(SharedRegion(os.dup(region.fd)), 0)
        with pytest.raises(RankFailed):
            group.all_reduce(torch.ones(1))
        return "ended"

    try:
        assert run_forked(2, work) == ["ended", ""]
    finally:
        region.close()


def test_a_dead_parent_ends_the_wait() -> None:
    region = create_group_region(2)

    def alive() -> None:
        raise RankFailed("the engine's process has ended")

    group = SharedMemoryGroup(region, 0, alive)
    with pytest.raises(RankFailed, match="engine's process"):
        group.barrier()
    group.close()


def test_counters_survive_their_wrap_around() -> None:
    """uint32 counters wrap after four thousand million phases."""

    def work(rank: int) -> list[float]:
        group = SharedMemoryGroup(SharedRegion(os.dup(region.fd)), rank)
        return [float(group.all_reduce(torch.full((2,), float(i)))[0]) for i in range(6)]

    region = create_group_region(2)
    words = region.view(0, 4096, "I")
    for line in (1, 2, 3):
        words[line * 32] = 0xFFFFFFFD
    try:
        assert run_forked(2, work) == [[2.0 * i for i in range(6)]] * 2
    finally:
        region.close()


def test_seven_ranks_do_not_collapse() -> None:
    """A generous bound, far below what spinning ranks that keep each other from running would take."""

    def work(group: Group) -> float:
        x = torch.ones(4096)
        group.barrier()
        begin = time.perf_counter()
        for _ in range(100):
            group.all_reduce(x)
        return (time.perf_counter() - begin) / 100

    assert max(run_processes(7, work)) < 0.05
