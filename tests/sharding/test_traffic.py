"""Bytes a decode step reads, against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_checkpoints import GB, fake_spec, planned

from multitensor.architectures.spec import LayerSpec, ModelSpec
from multitensor.sharding.plan import Plan
from multitensor.sharding.solve import solve
from multitensor.sharding.traffic import decode_bytes, decode_kv_bytes, decode_weight_bytes


def plan_of(spec: ModelSpec, ranks: int, kv_type: str = "f16") -> Plan:
    devices = planned(*[GB * 4] * ranks)
    return solve(spec, devices, kv_type=kv_type, max_num_seqs=4, max_batch_tokens=64, block_size=32)


def test_weights_without_the_embedding() -> None:
    plan = plan_of(fake_spec(hidden=64, vocab=320), 1)
    resident = sum(tensor.resident_bytes(0) for tensor in plan.tensors.values())
    assert decode_weight_bytes(plan, plan.ranks[0]) == resident - 320 * 64 * 2


def test_a_tied_embedding_is_the_lm_head() -> None:
    plan = plan_of(fake_spec(tied=True), 1)
    assert decode_weight_bytes(plan, plan.ranks[0]) == sum(t.resident_bytes(0) for t in plan.tensors.values())


@pytest.mark.parametrize(("kv_type", "head_bytes"), [("f16", 128), ("f32", 256)])
def test_cache_of_a_rank(kv_type: str, head_bytes: int) -> None:
    """Two layers, two KV heads of 64, one a rank."""
    plan = plan_of(fake_spec(n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64), 2, kv_type)
    for rank in plan.ranks:
        assert decode_kv_bytes(plan, rank, 100) == 2 * 2 * 1 * head_bytes * 100


def test_a_window_bounds_what_is_read() -> None:
    spec = fake_spec(n_layers=2, n_kv_heads=2, head_dim=64)
    plan = plan_of(replace(spec, layers=(LayerSpec(window=16), LayerSpec())), 1)
    assert decode_kv_bytes(plan, plan.ranks[0], 100) == 2 * 2 * 128 * (16 + 100)
    assert decode_kv_bytes(plan, plan.ranks[0], 10) == 2 * 2 * 128 * (10 + 10)


def test_sequences_share_the_weights() -> None:
    plan = plan_of(fake_spec(), 1)
    rank = plan.ranks[0]
    one, four = decode_bytes(plan, rank, 1, 50), decode_bytes(plan, rank, 4, 50)
    assert four - one == 3 * decode_kv_bytes(plan, rank, 50) > 0
