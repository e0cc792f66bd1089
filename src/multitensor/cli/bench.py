"""`multitensor bench`: prefill and decode speed through the public engine, as a table and as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from multitensor.cli import options
from multitensor.cli.output import human_bytes, loading_bar, warn
from multitensor.errors import InputError

if TYPE_CHECKING:
    from multitensor import LLM


@dataclass(frozen=True)
class Result:
    """tokens_per_second: median over the repetitions, all sequences together.
    weight_bytes_per_second: resident weight bytes of the fullest rank times forward passes a second (decode only; the
    floor is the memory's bandwidth)."""

    test: str
    ranks: int
    batch: int
    tokens: int
    tokens_per_second: float
    slowest: float
    fastest: float
    weight_bytes_per_second: float | None


def command(
    model: options.Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt-tokens", help="Prompt lengths.")] = "512",
    generate: Annotated[str, typer.Option("-n", "--generate", help="Tokens to decode.")] = "128",
    batch: Annotated[str, typer.Option("-b", "--batch", help="Sequences decoded together.")] = "1",
    tp: Annotated[str | None, typer.Option("--tp", help="Rank counts, as 1,2.", show_default=False)] = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="The median of so many runs.")] = 5,
    devices: options.Devices = None,
    ratio: options.Ratio = None,
    ctx: options.Ctx = None,
    dtype: options.Dtype = None,
    kv_type: options.KvType = None,
    as_json: options.Json = False,
) -> None:
    """Measure prefill and decode of MODEL, warm, as medians.

    multitensor bench MODEL -p 512,4096 -n 128 -b 1,4 --tp 1,2
    """
    from multitensor import LLM

    prompts, counts, batches = _numbers("-p", prompt), _numbers("-n", generate), _numbers("-b", batch)
    needed = max([*prompts, *counts]) + 16
    results: list[Result] = []
    for ranks in _numbers("--tp", tp) if tp else (None,):
        with loading_bar(quiet=as_json) as progress:
            llm = LLM._open(
                model,
                progress=progress,
                tensor_parallel_size=ranks,
                devices=devices,
                ratio=ratio,
                max_model_len=ctx or needed,
                dtype=dtype,
                kv_type=kv_type,
                max_num_seqs=max(batches),
                prefix_cache="off",  # prompts that begin alike must not look fast
            )
        with llm:
            for warning in llm.plan.warnings:
                warn(warning)
            results += _measure(llm, prompts, counts, batches, repetitions)
    report = {"model": model, "machine": machine(), "results": [asdict(result) for result in results]}
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print(results)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0:
        raise InputError(f"bench: {option} {text!r} is not a list of numbers such as 512,4096")
    return numbers


def machine() -> dict[str, object]:
    """What a figure means nothing without."""
    from importlib.metadata import version

    from multitensor import __version__
    from multitensor.sharding.topology import find_devices

    return {
        "multitensor": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": [f"{device.name} {device.description}".strip() for device in find_devices(None, None)],
    }


def _measure(
    llm: LLM, prompts: tuple[int, ...], counts: tuple[int, ...], batches: tuple[int, ...], repetitions: int
) -> list[Result]:
    results = [_time(llm, "prefill", 1, length, repetitions) for length in prompts if length]
    results += [_time(llm, "decode", size, count, repetitions) for size in batches for count in counts if count]
    return results


def _time(llm: LLM, test: str, batch: int, tokens: int, repetitions: int) -> Result:
    """Random ids, end-of-text ignored. A decode starts from one token, as llama-bench's does."""
    import numpy as np

    from multitensor import SamplingParams

    vocabulary = llm.plan.spec.vocab_size
    random = np.random.default_rng(0)
    length, count = (tokens, 1) if test == "prefill" else (1, tokens)
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    speeds = []
    for _ in range(repetitions + 1):
        ids = [random.integers(0, vocabulary, length).tolist() for _ in range(batch)]
        started = time.perf_counter()
        llm.generate(ids, params)
        speeds.append(batch * tokens / (time.perf_counter() - started))
    warm = speeds[1:]
    median = statistics.median(warm)
    fullest = max(sum(entry.weights.values()) for entry in llm.memory_plan)
    moved = fullest * median / batch if test == "decode" else None
    return Result(test, llm.plan.size, batch, tokens, median, min(warm), max(warm), moved)


def _print(results: list[Result]) -> None:
    table = Table("test", "ranks", "batch", "tokens", "tokens/s", "slowest", "fastest", "weights read a rank")
    for r in results:
        moved = f"{human_bytes(r.weight_bytes_per_second)}/s" if r.weight_bytes_per_second else ""
        row = (r.tokens_per_second, r.slowest, r.fastest)
        table.add_row(r.test, str(r.ranks), str(r.batch), str(r.tokens), *(f"{x:,.1f}" for x in row), moved)
    Console(highlight=False).print(table)
