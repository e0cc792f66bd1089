"""A plan as JSON-serialisable data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from multitensor.architectures.cut_rules import CutHeads
from multitensor.sharding.memory import device_memory

if TYPE_CHECKING:
    from multitensor.sharding.plan import Plan, TensorPlan


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Sizes in bytes. `slices`: one [start, stop] a rank (a list of them for a tensor of several segments)."""
    return {
        "architecture": plan.spec.architecture,
        "context": plan.context,
        "kv_tokens": plan.kv_tokens,
        "kv_type": plan.kv_type,
        "dtype": plan.dtype,
        "block_size": plan.block_size,
        "max_num_seqs": plan.max_num_seqs,
        "max_batch_tokens": plan.max_batch_tokens,
        "ratios": {group: list(ratio) for group, ratio in vars(plan.ratios).items()},
        "devices": _devices(plan),
        "tensors": [_tensor(plan, tensor) for tensor in plan.tensors.values()],
        "warnings": list(plan.warnings),
    }


def _devices(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": rank.device.name,
            "description": rank.device.description,
            "capacity_bytes": rank.device.capacity_bytes,
            "weights_bytes": sum(memory.weights.values()),
            "kv_bytes": memory.kv,
            "buffers_bytes": memory.buffers,
            "weights_bytes_by_group": dict(memory.weights),
            "buffers_bytes_by_use": dict(memory.buffer_parts),
            "host_bytes": sum(memory.host.values()),
            "host_bytes_by_use": dict(memory.host),
            "query_heads": list(rank.query_heads),
            "kv_heads": list(rank.kv_heads),
            "kv_map": list(rank.kv_map),
            "ffn": list(rank.ffn),
            "vocabulary": list(rank.vocabulary),
            "stage": rank.stage,
        }
        for rank, memory in zip(plan.ranks, device_memory(plan), strict=True)
    ]


def with_ratios(plan: Plan, held: Sequence[Mapping[str, int]]) -> list[dict[str, int | float]]:
    """What the ranks say that they hold (ModelRunner.memory), and for each "weights_over_plan": its resident weights
    over those of the plan, 1.0 where they are equal."""
    planned = [sum(memory.weights.values()) for memory in device_memory(plan)]
    return [
        {**measured, "weights_over_plan": round(measured["weights_bytes"] / weights, 4) if weights else 1.0}
        for measured, weights in zip(held, planned, strict=True)
    ]


def _tensor(plan: Plan, tensor: TensorPlan) -> dict[str, Any]:
    rule = tensor.decl.rule
    slices = [[list(part) for part in parts] or [[0, 0]] for parts in tensor.slices]
    return {
        "name": tensor.name,
        "type": tensor.decl.info.type.name,
        "shape": list(tensor.decl.info.shape),
        "group": tensor.decl.group,
        "layer": tensor.decl.layer,
        "stage": tensor.stage,
        "rule": type(rule).__name__ + (f"({rule.side})" if isinstance(rule, CutHeads) else ""),
        "axis": tensor.axis,
        "slices": [parts[0] if len(parts) == 1 else parts for parts in slices],
        "resident_bytes": [tensor.resident_bytes(rank) for rank in range(plan.size)],
        "reason": tensor.reason,
    }
