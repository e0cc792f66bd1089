"""`multitensor run`: write text, or chat in the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multitensor.cli import options
from multitensor.cli.output import loading_bar, warn
from multitensor.errors import InputError

if TYPE_CHECKING:
    from multitensor import LLM, RequestOutput, SamplingParams


def command(
    model: options.Model,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", help="Text to continue; - reads stdin. Without it: a chat.", show_default=False),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(help="Token ids to continue, as 1,2,3 (for files without a vocabulary).", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("-n", "--max-tokens", help="Tokens to write at most. Default: 256; in a chat until done.", min=0),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put -p through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt of a chat.", show_default=False)] = None,
    tp: options.Tp = None,
    devices: options.Devices = None,
    ratio: options.Ratio = None,
    ctx: options.Ctx = None,
    dtype: options.Dtype = None,
    kv_type: options.KvType = None,
    temp: Annotated[float, typer.Option("--temp", help="Temperature; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest; 0 keeps all.")] = 40,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest that sum to p.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Drop those under min-p times the likeliest.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Same seed, same plan: same text.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Run MODEL over this machine's GPUs, or CPU ranks: -p TEXT writes text to stdout, without it you chat.

    Everything else goes to stderr, and ends with tokens a second for prefill and decode. Ctrl-C stops.
    """
    from multitensor import LLM, SamplingParams

    if prompt is not None and ids is not None:
        raise InputError("run: give -p or --ids, not both")
    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=max_tokens)
    started = time.perf_counter()
    with loading_bar(quiet=as_json) as progress:
        llm = LLM._open(
            model,
            progress=progress,
            tensor_parallel_size=tp,
            devices=devices,
            ratio=ratio,
            max_model_len=ctx,
            dtype=dtype,
            kv_type=kv_type,
            seed=seed,
        )
    with llm:
        loaded = time.perf_counter() - started
        for warning in llm.plan.warnings:
            warn(warning)
        if text is None and ids is None:
            _chat(llm, params, system)
            return
        if max_tokens is None:
            params = _with_max_tokens(params, 256)
        tokens = _parse_ids(ids) if ids is not None else _prompt_ids(llm, text or "", chat, system)
        _write_once(llm, tokens, text, params, loaded, as_json)


@dataclass(frozen=True)
class Timing:
    """Seconds and tokens a second of one request, as its reader saw them."""

    prompt_tokens: int
    output_tokens: int
    first_token_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.first_token_seconds if self.first_token_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return (self.output_tokens - 1) / self.decode_seconds if self.output_tokens > 1 and self.decode_seconds else 0.0

    def line(self) -> str:
        decode = f"{self.decode_tokens_per_second:.1f} tokens/s" if self.output_tokens > 1 else "-"
        return (
            f"prefill {self.prompt_tokens} tokens, {self.prefill_tokens_per_second:.1f} tokens/s; "
            f"decode {self.output_tokens} tokens, {decode}"
        )


def _with_max_tokens(params: SamplingParams, count: int) -> SamplingParams:
    from dataclasses import replace

    return replace(params, max_tokens=count)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(" ", "").split(",") if part]
    except ValueError:
        raise InputError(f"run: --ids {text!r} is not a list of token ids such as 1,2,3") from None


def _prompt_ids(llm: LLM, text: str, chat: bool, system: str | None) -> str | list[int]:
    if not chat:
        return text
    return llm.chat_ids([*_messages(system), {"role": "user", "content": text}])


def _messages(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _write_once(
    llm: LLM, prompt: str | list[int], text: str | None, params: SamplingParams, loaded: float, as_json: bool
) -> None:
    output, timing = _stream(llm.stream(prompt, params), echo=not as_json)
    if as_json:
        done = output.outputs[0]
        report: dict[str, Any] = {
            "prompt": text,
            "prompt_token_ids": list(output.prompt_token_ids),
            "text": done.text,
            "token_ids": list(done.token_ids),
            "finish_reason": done.finish_reason,
            "load_seconds": loaded,
            **asdict(timing),
            "prefill_tokens_per_second": timing.prefill_tokens_per_second,
            "decode_tokens_per_second": timing.decode_tokens_per_second,
            "devices": [rank.device.name for rank in llm.plan.ranks],
        }
        typer.echo(json.dumps(report))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    sys.stderr.write(f"load {loaded:.1f} s; {timing.line()}\n")


def _stream(stream: Iterable[RequestOutput], echo: bool) -> tuple[RequestOutput, Timing]:
    """Drains a stream, writing text to stdout as it comes (token ids where there is no vocabulary)."""
    started = time.perf_counter()
    first = last = started
    count_at_first = written = 0
    output: RequestOutput | None = None
    for output in stream:
        last = time.perf_counter()
        tokens = output.outputs[0].token_ids
        if not count_at_first and tokens:
            first, count_at_first = last, len(tokens)
        if echo:
            sys.stdout.write(output.delta if output.prompt is not None or output.delta else "")
            if not output.outputs[0].text and tokens:
                sys.stdout.write("".join(f"{token} " for token in tokens[written:]))
            sys.stdout.flush()
        written = len(tokens)
    if output is None:
        raise InputError("run: the prompt is empty and the model has no beginning-of-text token to start from")
    return output, Timing(len(output.prompt_token_ids), written, first - started, last - first)


def _chat(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """A conversation on the terminal. Ctrl-C stops an answer; Ctrl-D or /exit ends it."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() history and editing

    if not llm.has_vocabulary:
        raise InputError("run: this file has no vocabulary, so it cannot chat; use --ids 1,2,3")
    sys.stderr.write("Chat with the model. /reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer.\n")
    messages = _messages(system)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            sys.stderr.write("\n")
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = _messages(system)
        elif line:
            messages.append({"role": "user", "content": line})
            _answer(llm, messages, params)


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> None:
    pieces: list[str] = []

    def heard(stream: Iterable[RequestOutput]) -> Iterable[RequestOutput]:
        for output in stream:
            pieces.append(output.delta)
            yield output

    stream = llm.stream(llm.chat_ids(messages), params)
    try:
        _, timing = _stream(heard(stream), echo=True)
        sys.stderr.write(f"\n[{timing.line()}]\n")
    except KeyboardInterrupt:
        stream.close()
        sys.stderr.write("\n[stopped]\n")
    except InputError as error:
        # The conversation has outgrown the context; say so and let the user /reset instead of losing the session.
        messages.pop()
        sys.stderr.write(f"{error} (/reset starts over)\n")
        return
    messages.append({"role": "assistant", "content": "".join(pieces)})
