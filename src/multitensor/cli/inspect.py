"""`multitensor inspect`: what is in a model file, from its header alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from multitensor.cli import options
from multitensor.cli.output import human_bytes

if TYPE_CHECKING:
    from multitensor.formats.checkpoint import Checkpoint


def command(
    model: options.Model,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: options.Json = False,
) -> None:
    """Print a model's metadata, its tensor types and its size. Reads headers only."""
    from multitensor.formats.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    summary = _summary(checkpoint)
    if as_json:
        summary["metadata"] = dict(_short_metadata(checkpoint.metadata))
        summary["tensors"] = [
            {
                "name": t.name,
                "shape": list(t.shape),
                "type": t.type.name,
                "file": t.file,
                "offset": t.offset,
                "bytes": t.nbytes,
            }
            for t in checkpoint.tensors.values()
        ]
        typer.echo(json.dumps(summary, default=str))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{model}: {summary['format']}, architecture {_plain(summary['architecture'])}", markup=False)
    console.print(
        f"{summary['parameters'] / 1e6:,.1f} M parameters in {summary['tensor_count']} tensors, "
        f"{human_bytes(summary['bytes'])}, {summary['bits_per_weight']:.2f} bits a weight, {summary['files']} file(s)"
    )
    types = ", ".join(f"{name} {count}" for name, count in summary["types"].items())
    console.print(f"types: {types}")
    for key, value in _short_metadata(checkpoint.metadata):
        console.print(f"  {_plain(key)} = {_plain(str(value))}", markup=False)
    if tensors:
        table = Table("tensor", "type", "shape", "bytes")
        for t in checkpoint.tensors.values():
            table.add_row(
                Text(_plain(t.name)),
                t.type.name,
                "x".join(map(str, t.shape)),
                str(t.nbytes),
            )
        console.print(table)


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    infos = checkpoint.tensors.values()
    parameters = sum(prod(t.shape) for t in infos)
    nbytes = sum(t.nbytes for t in infos)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": checkpoint.architecture,
        "files": len(checkpoint.files),
        "parameters": parameters,
        "bytes": nbytes,
        "bits_per_weight": nbytes * 8 / parameters if parameters else 0.0,
        "tensor_count": len(checkpoint.tensors),
        "types": dict(Counter(t.type.name for t in infos).most_common()),
    }


def _short_metadata(metadata: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arrays by their length and first items, long texts by their beginning: nobody reads 262,144 tokens."""
    for key, value in metadata.items():
        if isinstance(value, str):
            yield key, value if len(value) <= 120 else f"{value[:117]!r}... ({len(value)} characters)"
        elif hasattr(value, "__len__") and not isinstance(value, Mapping) and len(value) > 8:
            first = ", ".join(str(value[i]) for i in range(4))
            yield key, f"[{first}, ...] ({len(value)} items)"
        else:
            yield key, value


def _plain(text: str) -> str:
    """Text of a file as it may be printed: what it says must not drive the terminal."""
    return text if text.isprintable() else repr(text)
