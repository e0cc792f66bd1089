"""A model's path and the user's wishes -> an opened checkpoint, its plan, and the engine's settings (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

from multitensor.architectures.registry import resolve
from multitensor.architectures.spec import ModelSpec
from multitensor.config import DeviceRequest, EngineConfig, parse_devices, parse_experiments, parse_ratio
from multitensor.engine.step_watch import step_seconds
from multitensor.errors import DoesNotFit, InputError
from multitensor.formats.checkpoint import Checkpoint, open_checkpoint
from multitensor.sharding.memory import device_memory
from multitensor.sharding.plan import Plan
from multitensor.sharding.solve import solve
from multitensor.sharding.topology import find_devices

DEFAULT_NUM_SEQS = 32
DEFAULT_BATCH_TOKENS = {"cpu": 512, "cuda": 2048, "any": 2048}
LONG_BATCH_TOKENS = 4096  # of prompts alone, on GPUs where that costs no context and next to nothing of the KV pool
POOL_FOR_LONG_STEPS = 0.05
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Prepared:
    """Everything that is decided before a rank is started."""

    checkpoint: Checkpoint
    spec: ModelSpec
    plan: Plan
    config: EngineConfig


def prepare(
    model: str | Path,
    *,
    tensor_parallel_size: int | None = None,
    devices: str | Sequence[str] | Sequence[DeviceRequest] | None = None,
    ratio: str | Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    max_model_len: int | None = None,
    dtype: str | None = None,
    kv_type: str | None = None,
    seed: int | None = 0,
    max_num_seqs: int | None = None,
    max_batch_tokens: int | None = None,
    block_size: int = BLOCK_SIZE,
    allow_planned_devices: bool = False,
    prefix_cache: Literal["shared", "key", "off"] = "shared",
    p2p: bool | None = None,
    overlap: bool = False,
    experimental: Sequence[str] = (),
    step_timeout: float | None = None,
) -> Prepared:
    """Opens the model's headers and plans it; reads no weight.

    devices: "cpu:2", "cuda:0,cuda:1=24GiB", a list of such, or None for every GPU found (or one CPU rank). ratio:
    "3,1", numbers, or a mapping from kind to numbers. max_model_len: context in tokens. dtype "float32" given
    explicitly is the exact mode. allow_planned_devices: bare sizes are devices too, and types without a kernel pass.
    prefix_cache: which requests reuse what was computed of a common beginning; p2p: whether GPUs may use each other's
    memory; overlap: whether sums over GPUs travel while products are computed; experimental: ways to try; as in
    EngineConfig. step_timeout: as there; by default 120 s on GPUs, 600 s and more on CPUs.
    Raises InputError and DoesNotFit in one line.
    """
    if not isinstance(model, (str, Path)) or not str(model):
        raise InputError(f"model must be the path of a .gguf file or a Hugging Face folder, not {model!r}")
    integers = {
        "tensor_parallel_size": tensor_parallel_size,
        "max_model_len": max_model_len,
        "max_batch_tokens": max_batch_tokens,
    }
    for name, value in integers.items():
        _check_integer(name, value)
    _check_integer("seed", seed)
    step_seconds(step_timeout, "any")
    ratio = _ratio(ratio)
    if devices is None and tensor_parallel_size is None and isinstance(ratio, tuple):
        tensor_parallel_size = len(ratio)
    checkpoint = open_checkpoint(model)
    spec = resolve(checkpoint)
    found = find_devices(_device_requests(devices), tensor_parallel_size)
    if not allow_planned_devices:
        _require_runnable(spec, planned=any(device.kind == "any" for device in found))
    batch_tokens = max_batch_tokens if max_batch_tokens is not None else DEFAULT_BATCH_TOKENS[found[0].kind]
    num_seqs = max_num_seqs if max_num_seqs is not None else min(DEFAULT_NUM_SEQS, batch_tokens)
    if num_seqs < 1 or batch_tokens < num_seqs or block_size < 1:
        raise InputError(
            f"max_num_seqs {num_seqs}, max_batch_tokens {batch_tokens}, block_size {block_size}: all are at least 1, "
            "and a step must hold a token of every sequence"
        )

    def planned(tokens: int) -> Plan:
        return solve(
            spec,
            found,
            ratio=ratio,
            context=max_model_len,
            kv_type=kv_type or "auto",
            dtype=dtype or "auto",
            max_num_seqs=num_seqs,
            max_batch_tokens=tokens,
            block_size=block_size,
        )

    plan = planned(batch_tokens)
    if max_batch_tokens is None and found[0].kind != "cpu":
        plan = _in_long_steps(plan, planned)
    weight_bytes = sum(sum(entry.weights.values()) for entry in device_memory(plan))
    config = EngineConfig(
        model=str(model),
        dtype=plan.dtype,
        exact=dtype == "float32",
        seed=int(seed or 0),
        max_num_seqs=num_seqs,
        max_batch_tokens=plan.max_batch_tokens,
        block_size=block_size,
        prefix_cache=prefix_cache,
        p2p=p2p,
        overlap=overlap,
        mixed_batch_tokens=min(batch_tokens, max(num_seqs, DEFAULT_BATCH_TOKENS[found[0].kind])),
        experimental=parse_experiments(experimental),
        step_timeout=step_seconds(step_timeout, found[0].kind, plan.max_batch_tokens, weight_bytes),
    )
    return Prepared(checkpoint, spec, plan, config)


def _in_long_steps(plan: Plan, planned: Callable[[int], Plan]) -> Plan:
    """The plan with longer steps, in which weights are expanded for more tokens at once; as it is where their buffers
    would take too much from the KV pool, or the context is no longer than the steps are anyway."""
    if plan.context <= plan.max_batch_tokens:
        return plan
    try:
        longer = planned(LONG_BATCH_TOKENS)
    except DoesNotFit:
        return plan
    room = longer.context >= plan.context and longer.kv_tokens >= plan.kv_tokens * (1 - POOL_FOR_LONG_STEPS)
    return longer if room else plan


def _check_integer(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise InputError(f"{name} must be an integer, not {value!r}")


def _ratio(
    ratio: str | Sequence[float] | Mapping[str, Sequence[float]] | None,
) -> tuple[float, ...] | Mapping[str, Sequence[float]] | None:
    """Numbers, one a rank, or a mapping from kind to numbers. Raises InputError."""
    if ratio is None or isinstance(ratio, Mapping):
        return ratio
    if isinstance(ratio, str):
        return parse_ratio(ratio)
    good = isinstance(ratio, Sequence) and all(isinstance(part, Real) and not isinstance(part, bool) for part in ratio)
    if not good:
        raise InputError(f"ratio must be numbers such as [3, 1], not {ratio!r}")
    return tuple(float(part) for part in ratio)


def _device_requests(
    devices: str | Sequence[str] | Sequence[DeviceRequest] | None,
) -> tuple[DeviceRequest, ...] | None:
    if devices is None:
        return None
    if isinstance(devices, str):
        return parse_devices(devices)
    if not isinstance(devices, Sequence):
        raise InputError(f'devices must be text such as "cpu:2", or a list of it, not {devices!r}')
    requests = [entry for entry in devices if isinstance(entry, DeviceRequest)]
    if requests and len(requests) == len(devices):
        return tuple(requests)
    return parse_devices(",".join(str(entry) for entry in devices))


def _require_runnable(spec: ModelSpec, *, planned: bool) -> None:
    """Raises InputError for what can be planned but not run."""
    if planned:
        raise InputError("devices: sizes without a device are for `plan`; to run, write cpu:2 or cuda:0,cuda:1=24GiB")
    for decl in spec.tensors:
        if not decl.info.type.computable:
            raise InputError(
                f"tensor {decl.name} has type {decl.info.type.name}, which cannot be computed with yet; take a file "
                "with other types (Q4_K_M, Q8_0, F16)"
            )
