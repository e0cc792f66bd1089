"""The command `multitensor`: one file a command; exit codes 0 done, 1 a check failed, 2 bad input, 3 does not fit."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

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
    [bold]multitensor serve MODEL.gguf[/bold]             OpenAI's API and a chat page on http://127.0.0.1:8000
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows only ASCII must not end a run
    try:
        status = app(standalone_mode=False)
    except MultitensorError as error:
        fail(error)
    except _USAGE_ERROR as error:
        _fail_usage(error)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        _end_quietly_without_reader(error)
        raise
    if status == _INTERRUPTED:
        sys.stderr.write("interrupted\n")
    sys.exit(status if isinstance(status, int) else 0)


_INTERRUPTED = 130
_NO_READER = 141
# The command library's error for wrong words on the command line, wherever its version keeps the class.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


def _fail_usage(error: Exception) -> NoReturn:
    """One line, like every other error, and where help is; without any words, the help itself."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "multitensor"
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    sys.stderr.write(f"multitensor: {message.rstrip('.')}. See `{where} --help`.\n")
    sys.exit(2)


def _end_quietly_without_reader(error: BaseException) -> None:
    """When the reader of our stdout went away (`multitensor run ... | head -1`) nobody is left to tell; the exit code
    is the one a shell gives for SIGPIPE, since 1 would mean a failed check."""
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        sys.exit(_NO_READER)


if __name__ == "__main__":
    main()
