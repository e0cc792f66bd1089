"""`multitensor run`: write text, or chat in the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multitensor.cli import options
from multitensor.cli.output import loading_bar, warn_of
from multitensor.cli.rank_watch import raise_when_lost
from multitensor.engine.statistics import seconds_since_start
from multitensor.errors import InputError, RankFailed

if TYPE_CHECKING:
    from multitensor import LLM, RequestOutput, SamplingParams
    from multitensor.formats.tokenizer import Tokenizer
    from multitensor.sharding.plan import Plan

FEWEST_TO_TIME = 8  # decoded tokens: results come a step late and in clumps, so fewer would time the clumps


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
        typer.Option("-n", "--max-tokens", help="Tokens to write at most. Default: 256; in a chat until done.", min=1),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put -p through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt of a chat.", show_default=False)] = None,
    tp: options.Tp = None,
    devices: options.Devices = None,
    ratio: options.Ratio = None,
    ctx: options.Ctx = None,
    dtype: options.Dtype = None,
    kv_type: options.KvType = None,
    p2p: options.P2p = None,
    overlap: options.Overlap = False,
    chunk: options.Chunk = None,
    experimental: options.Experimental = "",
    step_timeout: options.StepTimeout = None,
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
    if system is not None and not chat and (prompt is not None or ids is not None):
        raise InputError("run: --system belongs to a chat; add --chat, or leave it out")
    text = sys.stdin.read() if prompt == "-" else prompt
    tokens = _parse_ids(ids) if ids is not None else None
    params = SamplingParams(temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=max_tokens)
    started = time.perf_counter()
    with loading_bar(quiet=as_json) as progress:
        llm = LLM._open(
            model,
            progress=progress,
            before_ranks=lambda tokenizer, plan: _check(tokenizer, plan, text, tokens),
            tensor_parallel_size=tp,
            devices=devices,
            ratio=ratio,
            max_model_len=ctx,
            dtype=dtype,
            kv_type=kv_type,
            p2p=p2p,
            overlap=overlap,
            max_batch_tokens=chunk,
            experimental=options.names(experimental),
            step_timeout=step_timeout,
            seed=seed,
        )
    with llm:
        loaded = time.perf_counter() - started
        warn_of(llm.warnings)
        if text is None and tokens is None:
            with raise_when_lost(llm._engine.check):
                _chat(llm, params, system)
            return
        if max_tokens is None:
            params = replace(params, max_tokens=256)
        asked = tokens if tokens is not None else _prompt_ids(llm, text or "", chat, system)
        _write_once(llm, asked, text, params, loaded, as_json)


def _check(tokenizer: Tokenizer | None, plan: Plan, text: str | None, tokens: list[int] | None) -> None:
    """What can be known to be wrong before minutes of loading. Raises InputError."""
    if tokenizer is None and tokens is None:
        raise InputError("run: this file has no vocabulary; give token ids, as in --ids 1,2,3")
    if text == "" and tokenizer is not None and not tokenizer.add_bos:
        raise InputError("run: the prompt is empty, and this model has no beginning-of-text token to start from")
    length = len(tokens) if tokens is not None else len(tokenizer.encode(text)) if text and tokenizer else 0
    if length >= plan.context:
        raise InputError(
            f"run: the prompt has {length} tokens, the context only {plan.context}; raise --ctx or shorten it"
        )
    wrong = next((token for token in tokens or () if not 0 <= token < plan.spec.vocab_size), None)
    if wrong is not None:
        raise InputError(
            f"run: --ids: {wrong} is not a token id of this model, which has 0 to {plan.spec.vocab_size - 1}"
        )


@dataclass(frozen=True)
class Timing:
    """Tokens and tokens a second of one request, as the engine measured them; None where there were too few to say."""

    prompt_tokens: int
    output_tokens: int
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None

    @staticmethod
    def of(output: RequestOutput) -> Timing:
        metrics = output.metrics
        if metrics is None:
            return Timing(len(output.prompt_token_ids), len(output.outputs[0].token_ids), None, None)
        decode = metrics.decode_tokens_per_second if metrics.decode_tokens >= FEWEST_TO_TIME else None
        return Timing(metrics.prompt_tokens, metrics.output_tokens, metrics.prefill_tokens_per_second, decode)

    def line(self) -> str:
        return (
            f"prefill {self.prompt_tokens} tokens, {_speed(self.prefill_tokens_per_second)}; "
            f"decode {self.output_tokens} tokens, {_speed(self.decode_tokens_per_second)}"
        )


def _speed(tokens_per_second: float | None) -> str:
    return "too few to time" if tokens_per_second is None else f"{tokens_per_second:.1f} tokens/s"


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
    output, first_token = _stream(llm, llm.stream(prompt, params), echo=not as_json)
    timing = Timing.of(output)
    if as_json:
        done = output.outputs[0]
        report: dict[str, Any] = {
            "prompt": text,
            "prompt_token_ids": list(output.prompt_token_ids),
            "text": done.text,
            "token_ids": list(done.token_ids),
            "finish_reason": done.finish_reason,
            "load_seconds": loaded,
            "first_token_seconds": first_token,
            **asdict(timing),
            "devices": [rank.device.name for rank in llm.plan.ranks],
            "memory": llm.memory(),
        }
        typer.echo(json.dumps(report))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    sys.stderr.write(f"load {loaded:.1f} s; first token {first_token:.1f} s after the command; {timing.line()}\n")


def _stream(llm: LLM, stream: Iterable[RequestOutput], echo: bool) -> tuple[RequestOutput, float]:
    """Drains a stream, writing text to stdout as it comes (token ids where there is no vocabulary). Returns the last
    output, and how old this process was, in seconds, when the first came."""
    written, first = 0, 0.0
    output: RequestOutput | None = None
    for output in stream:
        first = first or seconds_since_start()
        if echo and llm.has_vocabulary:
            sys.stdout.write(output.delta)
        elif echo:
            tokens = output.outputs[0].token_ids
            sys.stdout.write("".join(f"{token} " for token in tokens[written:]))
            written = len(tokens)
        sys.stdout.flush()
    if output is None:
        raise InputError("run: the prompt is empty and the model has no beginning-of-text token to start from")
    return output, first


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
        except RankFailed:
            sys.stderr.write("\n")  # leaves the prompt's line
            raise
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

    try:
        stream = llm.stream(llm.chat_ids(messages), params)
    except InputError as error:
        # The conversation has outgrown the context; say so and let the user /reset instead of losing the session.
        messages.pop()
        sys.stderr.write(f"{error} (/reset starts over)\n")
        return
    try:
        output, _ = _stream(llm, heard(stream), echo=True)
        sys.stderr.write(f"\n[{Timing.of(output).line()}]\n")
    except KeyboardInterrupt:
        stream.close()
        sys.stderr.write("\n[stopped]\n")
    messages.append({"role": "assistant", "content": "".join(pieces)})
