"""`multitensor plan`: what goes where, and whether it fits, before a byte of a weight is read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from multitensor.cli import options
from multitensor.cli.output import human_bytes, warn

if TYPE_CHECKING:
    from multitensor.sharding.memory import DeviceMemory
    from multitensor.sharding.plan import Plan


def command(
    model: options.Model,
    devices: options.Devices = None,
    tp: options.Tp = None,
    ratio: options.Ratio = None,
    ctx: options.Ctx = None,
    dtype: options.Dtype = None,
    kv_type: options.KvType = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor's slices, not one line a kind.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show how MODEL would be cut and what each device would hold. Exit code 3: it does not fit.

    Only headers are read; the GPUs need not exist: `multitensor plan MODEL --devices 24GiB,24GiB,12GiB`.
    """
    from multitensor.engine.prepare import prepare
    from multitensor.sharding.memory import device_memory

    prepared = prepare(
        model,
        tensor_parallel_size=tp,
        devices=devices,
        ratio=ratio,
        max_model_len=ctx,
        dtype=dtype,
        kv_type=kv_type,
        allow_planned_devices=True,
    )
    if as_json:
        typer.echo(json.dumps(prepared.plan.to_json()))
        return
    for warning in prepared.plan.warnings:
        warn(warning)
    console = Console(highlight=False)
    _print_devices(console, prepared.plan, device_memory(prepared.plan))
    _print_tensors(console, prepared.plan, every=tensors)


def _print_devices(console: Console, plan: Plan, memory: tuple[DeviceMemory, ...]) -> None:
    spec = plan.spec
    console.print(
        f"{spec.architecture}: {spec.n_layers} layers, hidden {spec.hidden_size}, {spec.n_heads} query heads and "
        f"{spec.n_kv_heads} KV heads of {spec.head_dim}, FFN {spec.ffn_size}, vocabulary {spec.vocab_size}"
    )
    console.print(
        f"context {plan.context}, KV pool {plan.kv_tokens} tokens in {plan.kv_type}, activations in {plan.dtype}"
    )
    groups = sorted({group for entry in memory for group in entry.weights})
    table = Table("rank", "device", "query heads", "KV heads", "FFN", "vocabulary", *groups, "KV", "buffers", "total", "of")
    for rank, entry in zip(plan.ranks, memory, strict=True):
        table.add_row(
            str(rank.rank),
            rank.device.name,
            _range(rank.query_heads),
            _range(rank.kv_heads),
            _range(rank.ffn),
            _range(rank.vocabulary),
            *(human_bytes(entry.weights.get(group, 0)) for group in groups),
            human_bytes(entry.kv),
            human_bytes(entry.buffers),
            human_bytes(entry.total),
            human_bytes(rank.device.capacity_bytes),
        )
    console.print(table)


def _range(part: tuple[int, int]) -> str:
    return f"{part[0]}-{part[1] - 1}" if part[1] > part[0] else "none"


def _print_tensors(console: Console, plan: Plan, every: bool) -> None:
    """Without `every`, block 0 stands for all blocks whose tensors are cut alike."""
    table = Table("tensor", "type", "shape", "rule", "slices by rank", "why")
    seen: dict[tuple[object, ...], int] = {}
    for entry in plan.to_json()["tensors"]:
        layer, _, short = entry["name"].partition(".")[2].partition(".")
        in_block = entry["name"].startswith("blk.") and layer.isdigit()
        key = (short if in_block else entry["name"], entry["type"], str(entry["slices"]))
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1 and not every:
            continue
        name = f"blk.*.{short} (from {layer})" if in_block and not every else entry["name"]
        slices = " ".join(f"{a}:{b}" for ranges in entry["slices"] for a, b in _pairs(ranges))
        shape = "x".join(map(str, entry.get("shape", ())))
        table.add_row(name, entry["type"], shape, entry["rule"], slices, entry.get("reason", ""))
    console.print(table)


def _pairs(ranges: list) -> list:
    """A rank's slices are one [start, stop] or a list of them."""
    return [ranges] if ranges and not isinstance(ranges[0], list) else ranges
