"""Choose the cut: ratios, types, context and the size of the KV pool, so that every device holds its part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from multitensor.architectures.spec import ModelSpec
from multitensor.config import DTYPES, KV_ALIASES, KV_TYPES, check_ratio
from multitensor.errors import DoesNotFit, InputError
from multitensor.sharding.memory import DeviceMemory, context_growth_per_token, device_memory, kv_bytes_per_token
from multitensor.sharding.plan import Plan, Ratios, make_plan
from multitensor.sharding.topology import Device

MIN_CONTEXT = 512  # a default context below this is no use; say that the model does not fit instead
EQUAL_WITHIN = 0.05  # capacities that differ by less are cut equally
POOL_CONTEXTS = 8  # sequences of full length that the KV pool aims to hold
POOL_SEQUENCE_TOKENS = 1024  # and as many sequences as may run at once, of so many tokens
CPU_POOL_TOKENS = 16384  # tokens that the KV pool of CPU ranks aims to hold where the context is shorter
CPU_POOL_SHARE = 4  # the default KV pool of a CPU rank takes at most this part of its memory: 1 / 4
MARGIN = 0.02  # of a device, left free by what is not asked for: the default context and the pool beyond one context
REPAIRS = 8  # attempts to move load from devices that are too full

RatioChoice = Sequence[float] | Mapping[str, Sequence[float]] | None


@dataclass(frozen=True)
class _Sizes:
    """What the caller has fixed and the plan only records."""

    kv_type: str
    dtype: str
    max_num_seqs: int
    max_batch_tokens: int
    block_size: int


def solve(
    spec: ModelSpec,
    devices: Sequence[Device],
    *,
    ratio: RatioChoice = None,
    context: int | None = None,
    kv_type: str = "auto",
    dtype: str = "auto",
    max_num_seqs: int,
    max_batch_tokens: int,
    block_size: int,
) -> Plan:
    """The plan for `spec` over `devices`, one rank each.

    ratio: one part a rank for everything, or a mapping of "attention", "ffn", "experts", "vocabulary" to one each;
    None: equal parts, or by capacity where capacities differ. context: tokens a sequence may have; None: what the
    model was trained for, or what fits. Raises DoesNotFit in one line, InputError for values that make no sense.
    """
    if not devices:
        raise InputError("no devices to cut the model over")
    if context is not None and context < 1:
        raise InputError(f"a context of {context}: at least 1 token is needed")
    resolved = resolve_dtype(dtype, spec, devices)
    sizes = _Sizes(
        resolve_kv_type(kv_type, dtype, resolved, devices), resolved, max_num_seqs, max_batch_tokens, block_size
    )
    if sizes.kv_type == "q4" and spec.head_dim % 8:
        raise InputError(f"KV type q4 packs eight numbers together, the model's heads have {spec.head_dim}; take q8")
    plan = _cut(spec, devices, ratio, context, sizes)
    chosen = _choose_context(plan) if context is None else context
    plan = replace(plan, context=chosen, kv_tokens=_round_up(chosen, block_size))
    _require_fit(plan)
    if chosen > spec.train_context:
        warning = (
            f"context {chosen} is beyond the {spec.train_context} tokens the model was trained for; expect worse text"
        )
        plan = replace(plan, warnings=(warning, *plan.warnings))
    return replace(plan, kv_tokens=_pool_tokens(plan))


def resolve_dtype(dtype: str, spec: ModelSpec, devices: Sequence[Device]) -> str:
    """ "auto" is float32 on a CPU; on a GPU bfloat16, or float16 where most weights are F16. Gemma stays with bfloat16:
    its activations leave float16's range. Raises InputError for an unknown type."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    if devices[0].kind == "cpu":
        return "float32"
    by_type: dict[str, int] = {}
    for decl in spec.tensors:
        by_type[decl.info.type.name] = by_type.get(decl.info.type.name, 0) + decl.info.nbytes
    return "float16" if max(by_type, key=lambda t: by_type[t]) == "F16" and not spec.post_norms else "bfloat16"


def resolve_kv_type(kv_type: str, dtype: str, resolved: str, devices: Sequence[Device]) -> str:
    """ "auto" is f16 on a CPU and the activations' type on a GPU; f32 where float32 was asked for (`dtype`)."""
    kv_type = KV_ALIASES.get(kv_type, kv_type)
    if kv_type not in KV_TYPES:
        raise InputError(f"KV type {kv_type!r} is unknown; known: {', '.join(KV_TYPES)}")
    if kv_type != "auto":
        return kv_type
    if dtype == "float32":
        return "f32"
    if devices[0].kind == "cpu":
        return "f16"
    return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[resolved]


def _cut(spec: ModelSpec, devices: Sequence[Device], ratio: RatioChoice, context: int | None, sizes: _Sizes) -> Plan:
    """Cut by the ratio given; else by capacity, moving load away from devices on which that does not fit."""
    needed = context or min(MIN_CONTEXT, spec.train_context)

    def cut(ratios: Ratios) -> Plan:
        return make_plan(
            spec, devices, ratios, context=needed, kv_tokens=_round_up(needed, sizes.block_size), **vars(sizes)
        )

    if ratio is not None:
        return cut(_given_ratios(ratio, len(devices)))
    first = plan = cut(Ratios.uniform(_ratio_by_capacity(devices)))
    for _ in range(REPAIRS):
        if len(devices) == 1 or _fits(plan):
            return plan
        loads = [
            (device.capacity_bytes - memory.buffers) / max(1, memory.total - memory.buffers)
            for device, memory in zip(devices, device_memory(plan), strict=True)
        ]
        shares = [max(0.0, part * load) for part, load in zip(plan.ratios.ffn, loads, strict=True)]
        if not any(shares):
            return first
        plan = cut(Ratios.uniform([round(share / max(shares), 4) for share in shares]))
    return plan if _fits(plan) else first


def _given_ratios(ratio: Sequence[float] | Mapping[str, Sequence[float]], size: int) -> Ratios:
    if not isinstance(ratio, Mapping):
        groups = dict.fromkeys(("attention", "ffn", "experts", "vocabulary"), tuple(ratio))
    else:
        unknown = set(ratio) - set(Ratios.__dataclass_fields__)
        if unknown:
            raise InputError(
                f"ratio: unknown kind {sorted(unknown)[0]!r}; known: {', '.join(Ratios.__dataclass_fields__)}"
            )
        equal = (1.0,) * size
        groups = {group: tuple(ratio.get(group, equal)) for group in Ratios.__dataclass_fields__}
    for parts in groups.values():
        if len(parts) != size:
            raise InputError(f"the ratio has {len(parts)} parts, but there are {size} ranks; give one part a rank")
        check_ratio(parts)
    return Ratios(**groups)


def _ratio_by_capacity(devices: Sequence[Device]) -> tuple[float, ...]:
    capacities = [device.capacity_bytes for device in devices]
    if max(capacities) <= 0 or min(capacities) >= max(capacities) * (1.0 - EQUAL_WITHIN):
        return (1.0,) * len(devices)
    return tuple(round(capacity / max(capacities), 3) for capacity in capacities)


def _fits(plan: Plan) -> bool:
    return all(
        memory.total <= rank.device.capacity_bytes for rank, memory in zip(plan.ranks, device_memory(plan), strict=True)
    )


def _tokens_that_fit(plan: Plan, *, contexts: bool, margin: float = 0.0) -> int:
    """Tokens for which every device has room beside weights and buffers: of context with its KV, or of the KV pool
    alone when the context stands. margin: part of each device to leave free."""
    room = []
    base = replace(plan, context=0) if contexts else plan  # buffers that grow with the context are counted by the token
    for rank, memory in zip(plan.ranks, device_memory(base), strict=True):
        per_token = kv_bytes_per_token(plan, rank) + (context_growth_per_token(plan) if contexts else 0)
        free = int(rank.device.capacity_bytes * (1.0 - margin)) - (memory.total - memory.kv)
        if per_token:
            room.append(max(0, free) // per_token)
    return min(room)


def _choose_context(plan: Plan) -> int:
    """The model's own context, or what fits, in whole blocks; on CPUs the default stays within the pool's share.
    Raises DoesNotFit when less than MIN_CONTEXT would be left."""
    floor = min(MIN_CONTEXT, plan.spec.train_context)
    _require_fit(plan)
    fits = min(_tokens_that_fit(plan, contexts=True, margin=MARGIN), max(floor, _pool_limit(plan)))
    if fits >= plan.spec.train_context:
        return plan.spec.train_context
    return max(floor, fits // plan.block_size * plan.block_size)


def _pool_limit(plan: Plan) -> int:
    """Tokens that the default KV pool may hold: no limit on GPUs, a part of the memory on CPUs."""
    limits = [
        rank.device.capacity_bytes // CPU_POOL_SHARE // kv_bytes_per_token(plan, rank)
        for rank in plan.ranks
        if rank.device.kind == "cpu" and kv_bytes_per_token(plan, rank)
    ]
    return min(limits, default=1 << 62)


def _pool_tokens(plan: Plan) -> int:
    """As many full contexts as are worth having, and room for all that may run at once where they are short, as far as
    these fit; at least one context."""
    context = _round_up(plan.context, plan.block_size)
    long, short = POOL_CONTEXTS * context, plan.max_num_seqs * min(context, POOL_SEQUENCE_TOKENS)
    aim = min(plan.max_num_seqs * context, max(long, short))
    if plan.ranks[0].device.kind == "cpu":
        aim = min(aim, CPU_POOL_TOKENS)
    fits = min(_tokens_that_fit(plan, contexts=False, margin=MARGIN), _pool_limit(plan))
    return max(plan.kv_tokens, min(aim, fits) // plan.block_size * plan.block_size)


def _round_up(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def _require_fit(plan: Plan) -> None:
    """Raises DoesNotFit, naming for every device that is too small what it needs and what it has."""
    short = [
        _shortage(rank.device, memory, plan)
        for rank, memory in zip(plan.ranks, device_memory(plan), strict=True)
        if memory.total > rank.device.capacity_bytes
    ]
    if not short:
        return
    shown = "; ".join(short[:4]) + (f"; and {len(short) - 4} more" if len(short) > 4 else "")
    raise DoesNotFit(f"the model does not fit: {shown}; {_advice(plan)}")


def _shortage(device: Device, memory: DeviceMemory, plan: Plan) -> str:
    return (
        f"{device.name} needs {_gb(memory.total)} of {_gb(device.capacity_bytes)} (weights "
        f"{_gb(sum(memory.weights.values()))}, KV of {plan.context} tokens {_gb(memory.kv)}, "
        f"buffers {_gb(memory.buffers)})"
    )


def _advice(plan: Plan) -> str:
    spare = [
        rank.device.capacity_bytes - memory.total for rank, memory in zip(plan.ranks, device_memory(plan), strict=True)
    ]
    advice = ["more or larger devices", "a smaller quantisation"]
    if plan.context > MIN_CONTEXT:
        largest = _tokens_that_fit(plan, contexts=True) // plan.block_size * plan.block_size
        advice.insert(0, f"a context of {largest}" if largest else "a smaller context")
    if sum(spare) > 0:
        advice.insert(0, "another ratio")
    return f"what helps: {', '.join(advice)}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
