"""What recorded decode steps and page-locked memory take of the plan, and that they take no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_checkpoints import fake_spec

from multitensor.errors import DoesNotFit
from multitensor.kernels.cuda import decode
from multitensor.kernels.cuda.decode import DecodeAttention
from multitensor.loading.loader import CUDA_CHUNK_BYTES, CUDA_READERS
from multitensor.sharding import memory
from multitensor.sharding.memory import device_memory, graph_buckets, graph_bytes, graph_words, host_memory_bytes
from multitensor.sharding.plan import Plan
from multitensor.sharding.report import with_ratios
from multitensor.sharding.solve import solve
from multitensor.sharding.topology import Device

GB = 10**9


def plan_of(*sizes: int, kind: Any = "cuda", seqs: int = 32, block: int = 32, **options: Any) -> Plan:
    spec = fake_spec(hidden=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, vocab=100, context=1 << 20)
    devices = [Device(f"{kind}:{i}", kind, i, size, size) for i, size in enumerate(sizes)]
    return solve(spec, devices, max_num_seqs=seqs, max_batch_tokens=64, block_size=block, **options)


@pytest.mark.parametrize(
    ("seqs", "buckets"),
    [(1, (1,)), (3, (1, 2, 4)), (32, (1, 2, 4, 8, 16, 32)), (33, (1, 2, 4, 8, 16, 32, 64))],
)
def test_steps_are_recorded_for_as_many_as_may_run(seqs: int, buckets: tuple[int, ...]) -> None:
    plan = plan_of(8 * GB, seqs=seqs, context=1000, dtype="float16")
    assert graph_buckets(plan) == buckets
    (held,) = device_memory(plan)
    assert held.buffer_parts["graphs"] == graph_bytes(plan, plan.ranks[0], buckets) > 0
    # A table of 32 blocks, an id, a slot, a position and a place each; the count of steps.
    assert [graph_words(plan, size) for size in buckets] == [size * 36 + 1 for size in buckets]


@pytest.mark.parametrize("options", [{"kind": "cpu"}, {"dtype": "float32"}])
def test_where_no_step_is_recorded_none_is_planned(options: dict[str, Any]) -> None:
    plan = plan_of(8 * GB, context=1000, **options)
    assert graph_buckets(plan) == () and device_memory(plan)[0].buffer_parts.get("graphs", 0) == 0


def test_tables_of_a_longer_context_are_counted_by_the_token() -> None:
    """So that a context that is said to fit does."""
    short, long = (plan_of(8 * GB, seqs=64, context=n, block=16) for n in (1 << 10, 1 << 16))
    more = device_memory(long)[0].buffer_parts["graphs"] - device_memory(short)[0].buffer_parts["graphs"]
    assert more == 127 * 4 * ((1 << 16) - (1 << 10)) // 16
    with pytest.raises(DoesNotFit) as caught:
        plan_of(3 * GB, seqs=64, context=1 << 20, block=16)
    advised = int(str(caught.value).split("a context of ")[1].split(",")[0])
    (held,) = device_memory(plan_of(3 * GB, seqs=64, context=advised, block=16))
    assert 0.95 * 3 * GB < held.total <= 3 * GB


def test_page_locked_memory_is_a_line_of_its_own() -> None:
    one, two = (plan_of(*sizes, seqs=4, context=1000) for sizes in ((8 * GB,), (8 * GB, 8 * GB)))
    (held,) = device_memory(one)
    assert held.host == {"loader": (CUDA_READERS + 2) * CUDA_CHUNK_BYTES, "peers": 0, "graphs": 256 + 512 + 1024}
    assert held.total == sum(held.weights.values()) + held.kv + held.buffers
    assert device_memory(two)[1].host["peers"] == host_memory_bytes(two) > 32 << 20
    (entry, _) = two.to_json()["devices"]
    assert entry["host_bytes"] == sum(entry["host_bytes_by_use"].values())
    assert device_memory(plan_of(8 * GB, kind="cpu", context=1000))[0].host == {}


@pytest.mark.parametrize("processors", [1, 60, 132, 192])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_type", [torch.float16, torch.float32])
@pytest.mark.parametrize("kv_map", [(0,), (0,) * 9, (0,) * 6 + (1,) * 6, tuple(range(40)), (0, 0, 0, 1) + (2,) * 20])
def test_attentions_scratch_is_no_more_than_planned(
    kv_map: tuple[int, ...], kv_type: torch.dtype, head_dim: int, processors: int
) -> None:
    assert memory.GRAPH_BUCKETS[-1] == decode.MAX_SEQUENCES  # also what single tokens beside prompts are planned for
    kernels: Any = SimpleNamespace(device=torch.device("cpu"), processors=processors)
    rank: Any = SimpleNamespace(kv_map=kv_map)
    for sequences in (1, 8, 64):
        scale = {"scale": 1.0}
        sizes = (kv_map, max(kv_map) + 1, head_dim, torch.float16, kv_type, decode.KEY_TILE, sequences)
        for warps in (4, 8):
            held = DecodeAttention(kernels, *sizes, warps=warps, **scale).nbytes
            assert held <= memory._attention_scratch(rank, head_dim, sequences)


def test_what_is_held_is_compared_with_the_plan() -> None:
    plan = plan_of(8 * GB, 8 * GB, context=1000)
    weights = [sum(entry.weights.values()) for entry in device_memory(plan)]
    held = with_ratios(plan, [{"weights_bytes": weights[0]}, {"weights_bytes": weights[1] * 103 // 100, "x": 7}])
    assert held[0] == {"weights_bytes": weights[0], "weights_over_plan": 1.0}
    assert held[1]["weights_over_plan"] == pytest.approx(1.03, abs=1e-4) and held[1]["x"] == 7
