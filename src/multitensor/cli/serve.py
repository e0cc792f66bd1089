"""`multitensor serve`: the model behind OpenAI's HTTP API, for many people at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from enum import StrEnum
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multitensor.cli import options
from multitensor.cli.output import loading_bar
from multitensor.errors import MultitensorError

if TYPE_CHECKING:
    import socket

    from multitensor.engine.async_engine import AsyncEngine
    from multitensor.engine.engine import Engine
    from multitensor.engine.executor import Progress
    from multitensor.server.settings import ServerSettings


Say = Callable[..., None]  # a message, and its level if it is more than news


class PrefixCache(StrEnum):
    SHARED = "shared"
    KEY = "key"
    OFF = "off"


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _errors_as_logs(command: Callable[..., None]) -> Callable[..., None]:
    """What ends the command is a line like all others where logs are JSON; else `main` tells it."""

    @wraps(command)
    def checked(**options: Any) -> None:
        try:
            command(**options)
        except MultitensorError as error:
            if options["log_format"] is not LogFormat.JSON:
                raise
            from multitensor.server import logs

            logs.say(LogFormat.JSON.value, " ".join(str(error).split()), logging.ERROR)
            raise typer.Exit(error.exit_code) from None

    return checked


@_errors_as_logs
def command(
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes any free one.", min=0, max=65535)] = 8000,
    tp: options.Tp = None,
    devices: options.Devices = None,
    ratio: options.Ratio = None,
    ctx: options.Ctx = None,
    parallel: Annotated[
        int | None, typer.Option(help="Sequences in one step at most. Default: 32.", min=1, show_default=False)
    ] = None,
    dtype: options.Dtype = None,
    kv_type: options.KvType = None,
    p2p: options.P2p = None,
    overlap: options.Overlap = False,
    chunk: options.Chunk = None,
    experimental: options.Experimental = "",
    step_timeout: options.StepTimeout = None,
    seed: Annotated[int, typer.Option(help="Of requests that have none of their own.")] = 0,
    prefix_cache: Annotated[
        PrefixCache,
        typer.Option(help="Who reuses what was computed of a common beginning: all, those of one key, none."),
    ] = PrefixCache.SHARED,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: the file's name.", show_default=False)
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="A further name; may be repeated.", show_default=False)
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of keys, see `multitensor keys`. Default: none asked.", show_default=False)
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).", show_default=False)] = None,
    audit_log: Annotated[
        Path | None, typer.Option(help="Append who asked, when, how much, to this file.", show_default=False)
    ] = None,
    audit_content: Annotated[
        bool, typer.Option("--audit-content", help="Into --audit-log: prompts and answers, too.")
    ] = False,
    max_streams: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 1024,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; one more is refused.", min=1)] = 512,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Longest prompt. Default: what the context holds.", min=1, show_default=False),
    ] = None,
    max_body_mib: Annotated[int, typer.Option(help="Largest request body, in MiB.", min=1)] = 16,
    drain: Annotated[
        float, typer.Option(help="Seconds that answers get after SIGTERM, before an error ends them.", min=0)
    ] = 30.0,
    log_format: Annotated[LogFormat, typer.Option(help="How logs on stderr look.")] = LogFormat.TEXT,
    log_level: Annotated[LogLevel, typer.Option(help="info has a line for each request.")] = LogLevel.WARNING,
) -> None:
    """Serve MODEL over HTTP: OpenAI's API under /v1, a chat page at /, documentation at /docs.

    Without --api-keys everybody who can connect may ask; by default that is this machine only. SIGTERM and Ctrl-C let
    the answers under way end; a second one ends them with an error. Exit code 1: the ranks failed, and could not be
    started again.
    """
    from multitensor.engine.async_engine import AsyncEngine
    from multitensor.server import logs, run
    from multitensor.server.manifest import model_digest
    from multitensor.server.settings import ServerSettings

    say = partial(logs.say, log_format.value)
    logs.set_up(log_format.value, log_level.value)
    digest, digest_warning = model_digest(model) if audit_log else ("", None)
    settings = ServerSettings(
        model_name=name or Path(model).name.removesuffix(".gguf"),
        aliases=tuple(alias or ()),
        host=host,
        port=port,
        api_keys=api_keys,
        audit_log=audit_log,
        audit_content=audit_content,
        model_digest=digest,
        tls_cert=tls_cert,
        tls_key=tls_key,
        max_body_bytes=max_body_mib << 20,
        max_prompt_tokens=max_prompt_tokens,
        max_streams=max_streams,
        max_waiting=max_waiting,
        drain_seconds=drain,
    )
    run.check_files(settings)
    sock, settings = run.bind(settings)
    warnings, open_engine = _opener(
        model,
        say,
        tensor_parallel_size=tp,
        devices=devices,
        ratio=ratio,
        max_model_len=ctx,
        max_num_seqs=parallel,
        dtype=dtype,
        kv_type=kv_type,
        p2p=p2p,
        overlap=overlap,
        max_batch_tokens=chunk,
        experimental=options.names(experimental),
        step_timeout=step_timeout,
        seed=seed,
        prefix_cache=prefix_cache.value,
    )
    for warning in filter(None, (digest_warning, *warnings)):
        say(warning, logging.WARNING)
    if not settings.loopback and api_keys is None:
        told = f"everybody who reaches {settings.url} may use this server; --api-keys FILE asks for a key"
        say(told, logging.WARNING)
    import asyncio  # here, as every command imports this file

    # One loop for both: the engine belongs to the loop in which it was started.
    with asyncio.Runner() as runner:
        engine = AsyncEngine(open_engine, max_waiting=max_waiting)
        runner.run(_serve(engine, settings, sock, say))


def _opener(model: str, say: Say, **wishes: Any) -> tuple[tuple[str, ...], Callable[[], Engine]]:
    """What to tell before the model is loaded, and what opens it; the first opening draws the progress bar, later ones
    (ranks that died) draw none."""
    from multitensor.engine.open_engine import engine_opener

    report: list[Progress | None] = [None]

    def progress(done: int, total: int) -> None:
        if report[0] is not None:
            report[0](done, total)

    open_engine = engine_opener(model, progress=progress, **wishes)

    def opening() -> Engine:
        with loading_bar() as bar:
            report[0] = bar
            try:
                engine = open_engine()
            finally:
                report[0] = None
        if warning := engine.call("reductions")[0]["warning"]:
            say(warning, logging.WARNING)
        engine.call("warm_up")  # so that no request waits for what GPUs do when they are first used
        return engine

    return open_engine.warnings, opening


async def _serve(engine: AsyncEngine, settings: ServerSettings, sock: socket.socket, say: Say) -> None:
    from multitensor.server import run

    began = time.perf_counter()

    def say_where() -> None:
        devices = ", ".join(rank.device.name for rank in engine.plan.ranks)
        seconds = time.perf_counter() - began
        say(f"{settings.model_name} on {devices}, context {engine.context}, ready after {seconds:.1f} s")
        say(f"serving at {settings.url} (API under /v1, chat at /, documentation at /docs)")

    try:
        await engine.start()
        await run.serve(engine, settings, sock, say_where)
    finally:
        sock.close()
        await engine.stop()
