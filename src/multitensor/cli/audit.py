"""`multitensor audit`: is a server's audit log whole?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from multitensor.cli import options

app = typer.Typer(no_args_is_help=True, help="Check a server's audit log.")


@app.callback()
def _root() -> None:
    pass


@app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="The file of `serve --audit-log`.", show_default=False)],
    head: Annotated[
        str | None,
        typer.Option(help="A hash noted earlier: it must still be in the chain.", show_default=False),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check that no record was changed, removed or inserted. Exit code 1 names the first line that is wrong.

    A chain cannot show that its last lines were cut off: note the head that this prints, on another machine, and give
    it to the next check.
    """
    from multitensor.server.audit import verify_log

    summary = verify_log(file, head)
    if as_json:
        typer.echo(json.dumps(vars(summary)))
        return
    between = f", from {summary.first_time} to {summary.last_time}" if summary.records else ""
    typer.echo(f"{file}: {summary.records} records, whole{between}")
    typer.echo(f"head {summary.head}")
