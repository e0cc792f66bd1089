"""Plan -> bytes that a step must read from a device's memory: the floor under a decode's time (never imports torch)."""

from __future__ import annotations

from multitensor.sharding.memory import kv_bytes_per_token
from multitensor.sharding.plan import Plan, RankPlan

EMBEDDING = "token_embd.weight"


def decode_weight_bytes(plan: Plan, rank: RankPlan) -> int:
    """Resident weights that every decode step reads. Of an embedding that is not the LM head too it reads a row a
    token, which does not count."""
    return sum(
        tensor.resident_bytes(rank.rank)
        for tensor in plan.tensors.values()
        if tensor.name != EMBEDDING or plan.spec.tied_embeddings
    )


def decode_kv_bytes(plan: Plan, rank: RankPlan, context: float) -> float:
    """Keys and values that a decode step reads for one sequence of `context` tokens; layers with a window read that."""
    tokens = sum(min(context, layer.window or context) for layer in plan.spec.layers)
    return kv_bytes_per_token(plan, rank) / plan.spec.n_layers * tokens


def decode_bytes(plan: Plan, rank: RankPlan, sequences: int, context: float) -> float:
    """Both, for so many sequences together."""
    return decode_weight_bytes(plan, rank) + sequences * decode_kv_bytes(plan, rank, context)
