"""The command `multitensor`: one file a command; exit codes 0 done, 1 a check failed, 2 bad input, 3 does not fit."""

from __future__ import annotations

import os
import sys

import typer

from multitensor.cli import audit, bench, inspect, keys, manifest, plan, pull, run, serve, verify
from multitensor.cli.output import fail
from multitensor.errors import MultitensorError

app = typer.Typer(
    name="multitensor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Run a language model with every weight cut over the GPUs (or CPU ranks) of this machine.

    [bold]multitensor pull smollm2-135m[/bold]            fetch a small model, print its path
    [bold]multitensor plan MODEL.gguf[/bold]              what fits, and how it is cut, before loading anything
    [bold]multitensor run MODEL.gguf -p "Hello"[/bold]    write text; without -p, chat in the terminal
    [bold]multitensor serve MODEL.gguf[/bold]           OpenAI's API and a chat page on http://127.0.0.1:8000
    [bold]multitensor verify MODEL.gguf --tp 2[/bold]     does the split model compute the same as the whole one?

    MODEL is a .gguf file (any part of a split one) or a Hugging Face folder with safetensors.
    Exit codes: 0 done, 1 a check failed or a rank died, 2 bad input, 3 does not fit.""",
)
app.command("run")(run.command)
app.command("serve")(serve.command)
app.command("plan")(plan.command)
app.command("verify")(verify.command)
app.command("bench")(bench.command)
app.command("inspect")(inspect.command)
app.command("pull")(pull.command)
app.add_typer(keys.app, name="keys")
app.add_typer(audit.app, name="audit")
app.add_typer(manifest.app, name="manifest")


def _version(show: bool) -> None:
    if show:
        from multitensor import __version__

        typer.echo(f"multitensor {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point. Every error made on purpose ends as one line on stderr and its exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0:
        from multitensor.engine import worker

        worker.join_torchrun()
        return
    try:
        app()
    except MultitensorError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our stdout went away (`multitensor run ... | head -1`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
