"""`multitensor keys`: who may ask a server; the file holds hashes, the secret is shown once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from multitensor.cli import options

app = typer.Typer(no_args_is_help=True, help="Add, list and revoke the API keys of a server.")

File = Annotated[Path, typer.Argument(help="The file of `serve --api-keys`.", show_default=False)]
Name = Annotated[str, typer.Argument(help="Who the key is for: letters, digits and . _ @ -", show_default=False)]


@app.command("add")
def add(
    file: File,
    name: Name,
    requests_per_minute: Annotated[int | None, typer.Option(help="Default: no limit.", show_default=False)] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Prompt and answer together. Default: no limit.", show_default=False)
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(help="Answers at a time: n times prompts of all requests. Default: no limit.", show_default=False),
    ] = None,
) -> None:
    """Make a key and print it: this is the only time it can be seen. A running server takes it at once."""
    from multitensor.server.auth import add_key, new_key

    key, secret = new_key(
        name, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, streams=streams
    )
    add_key(file, key)
    typer.echo(secret)


@app.command("list")
def list_keys(file: File, as_json: options.Json = False) -> None:
    """Print names and limits."""
    from multitensor.server.auth import LIMITS, read_keys

    keys = read_keys(file)
    if as_json:
        typer.echo(json.dumps([{"name": key.name} | {limit: getattr(key, limit) for limit in LIMITS} for key in keys]))
        return
    table = Table("name", *(limit.replace("_", " ") for limit in LIMITS), "sha256")
    for key in keys:
        limits = [getattr(key, limit) for limit in LIMITS]
        words = ["none" if limit is None else str(limit) for limit in limits]
        table.add_row(key.name, *words, f"{key.digest.hex()[:12]}...")
    Console(highlight=False).print(table)


@app.command("revoke")
def revoke(file: File, name: Name) -> None:
    """Remove a key. A running server refuses it from its next request on."""
    from multitensor.server.auth import revoke_key

    revoke_key(file, name)
    typer.echo(f"{name} is revoked")
