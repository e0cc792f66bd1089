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
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not one line a kind.")] = False,
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
        f"{spec.n_kv_heads} KV head(s) of {spec.head_dim}, FFN {spec.ffn_size}, vocabulary {spec.vocab_size}"
    )
    console.print(
        f"context {plan.context}, KV pool of {plan.kv_tokens} tokens in {plan.kv_type}, activations in {plan.dtype}, "
        f"up to {plan.max_batch_tokens} tokens of prompts in a step"
    )
    shares = Table("rank", "device", "query heads", "KV heads", "FFN", "vocabulary", title="Who computes what")
    for rank in plan.ranks:
        parts = (rank.query_heads, rank.kv_heads, rank.ffn, rank.vocabulary)
        shares.add_row(str(rank.rank), rank.device.name, *(_range(part) for part in parts))
    console.print(shares)
    held = Table("rank", "weights", "KV", "buffers", "total", "of", "used", title="What each device holds")
    for rank, entry in zip(plan.ranks, memory, strict=True):
        weights = sum(entry.weights.values())
        sizes = (weights, entry.kv, entry.buffers, entry.total, rank.device.capacity_bytes)
        used = entry.total / rank.device.capacity_bytes if rank.device.capacity_bytes else 0.0
        held.add_row(str(rank.rank), *(human_bytes(size) for size in sizes), f"{used:.0%}")
    console.print(held)
    if any(entry.host for entry in memory):
        most = max(sum(entry.host.values()) for entry in memory)
        console.print(f"beside them a rank page-locks at most {human_bytes(most)} of the host's memory")
    groups = sorted({group for entry in memory for group in entry.weights})
    for group in groups:
        per_rank = ", ".join(human_bytes(entry.weights.get(group, 0)) for entry in memory)
        console.print(f"  weights of {group}: {per_rank}")


def _range(part: tuple[int, int]) -> str:
    return f"{part[0]}-{part[1] - 1}" if part[1] > part[0] else "none"


def _print_tensors(console: Console, plan: Plan, every: bool) -> None:
    """Without `every`, one line stands for the same tensor of all blocks that are cut alike; reasons come as notes."""
    rows: dict[tuple[str, ...], list[dict]] = {}
    for entry in plan.to_json()["tensors"]:
        prefix, _, rest = entry["name"].partition(".")
        short = f"blk.*.{rest.partition('.')[2]}" if prefix == "blk" and not every else entry["name"]
        rows.setdefault((short, entry["type"], entry["rule"], str(entry["slices"])), []).append(entry)
    table = Table(title="How each tensor is cut (start:stop by rank)")
    table.add_column("tensor", overflow="fold")
    for heading in ("type", "shape", "how often"):
        table.add_column(heading, no_wrap=True)
    table.add_column("slices", overflow="fold")
    notes: dict[str, int] = {}
    for (short, kind, _, _), entries in rows.items():
        first = entries[0]
        reason = first.get("reason", "")
        mark = f" \\[{notes.setdefault(reason, len(notes) + 1)}]" if reason else ""
        slices = " ".join(f"{start}:{stop}" for ranges in first["slices"] for start, stop in _pairs(ranges)) or "none"
        whole = first["rule"].startswith("Replicate")
        shape = "x".join(map(str, first.get("shape", ())))
        held = "whole, on every rank" if whole else slices
        table.add_row(short.removesuffix(".weight") + mark, kind, shape, f"{len(entries)}x", held)
    console.print(table)
    for reason, number in notes.items():
        console.print(f"\\[{number}] {reason}")


def _pairs(ranges: list) -> list:
    """A rank's slices are one [start, stop] or a list of them."""
    return [ranges] if ranges and not isinstance(ranges[0], list) else ranges
