"""`multitensor bench`: prefill and decode speed through the public engine, as a table and as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table

from multitensor.cli import options
from multitensor.cli.output import loading_bar, warn_of
from multitensor.errors import InputError

if TYPE_CHECKING:
    from multitensor import LLM, RequestOutput

POOL_CONTEXTS = 8  # the KV pool is made for so many sequences of full length, see sharding/solve.py
WARM_UP_TOKENS = 8  # decoded before the first that is timed


@dataclass(frozen=True)
class Load:
    """How long a model took to be ready on so many ranks; rank by rank, seconds of the stages of that, and what its
    device's memory can do, measured in the ranks after the tests (None: no room was left to measure). reductions: how
    sums over ranks travel, as LLM.reductions."""

    ranks: int
    load_seconds: float
    stages: list[dict[str, float]]
    memory_bytes_per_second: list[float | None]
    reductions: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """tokens_per_second: median over the repetitions, all sequences together. first_token_seconds: median from giving
    the prompts to the first token. Of decodes only, with `depth` tokens in the cache of each sequence before:

    bytes_per_step: weights and cache that the fullest rank reads for a step, by the plan. bytes_per_second: that, over
    the time of a step. floor_percent: the time that every rank's memory needs at least for its bytes, at the speed that
    was measured for reading, over the time of a step. reduction_percent: what a step's reductions take when there is
    nothing else to do, over the time of a step.
    """

    test: str
    ranks: int
    batch: int
    tokens: int
    depth: int
    tokens_per_second: float
    slowest: float
    fastest: float
    first_token_seconds: float
    bytes_per_step: float | None = None
    bytes_per_second: float | None = None
    floor_percent: float | None = None
    reduction_percent: float | None = None


@dataclass(frozen=True)
class Work:
    """What is to be measured."""

    prompts: tuple[int, ...]
    counts: tuple[int, ...]
    batches: tuple[int, ...]
    depth: int
    repetitions: int

    @property
    def context(self) -> int:
        """Tokens a sequence that suffice for every test, with a KV pool that holds the largest batch."""
        longest = self.depth + max(self.counts) + WARM_UP_TOKENS
        contexts = min(max(self.batches), POOL_CONTEXTS)
        in_pool = -(-max(self.batches) * -(-(longest + 32) // 32) * 32 // contexts)
        return max(max(self.prompts) + 16, longest + 16, in_pool if max(self.counts) else 0)


def command(
    model: options.Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt-tokens", help="Prompt lengths; 0 for none.")] = "512",
    generate: Annotated[str, typer.Option("-n", "--generate", help="Tokens to decode; 0 for none.")] = "128",
    batch: Annotated[str, typer.Option("-b", "--batch", help="Sequences decoded together.")] = "1",
    depth: Annotated[
        int, typer.Option("-d", "--depth", min=0, help="Tokens in each sequence's cache before it decodes.")
    ] = 0,
    tp: Annotated[str | None, typer.Option("--tp", help="Rank counts, as 1,2.", show_default=False)] = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="The median of so many runs.")] = 5,
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
    as_json: options.Json = False,
) -> None:
    """Measure prefill and decode of MODEL, warm, as medians, and how near decoding comes to the memory's speed.

    multitensor bench MODEL -p 512,4096 -n 128 -b 1,4 --tp 1,2
    """
    from multitensor import LLM

    batches = _numbers("-b", batch)
    if min(batches) < 1:
        raise InputError(f"bench: -b {batch!r}: a batch has at least one sequence")
    work = Work(_numbers("-p", prompt), _numbers("-n", generate), batches, depth, repetitions)
    loads: list[Load] = []
    results: list[Result] = []
    for ranks in _numbers("--tp", tp) if tp else (None,):
        started = time.perf_counter()
        with loading_bar(quiet=as_json) as progress:
            llm = LLM._open(
                model,
                progress=progress,
                tensor_parallel_size=ranks,
                devices=devices,
                ratio=ratio,
                max_model_len=ctx or work.context,
                dtype=dtype,
                kv_type=kv_type,
                p2p=p2p,
                overlap=overlap,
                max_batch_tokens=chunk,
                experimental=options.names(experimental),
                step_timeout=step_timeout,
                max_num_seqs=max(batches),
                # Prompts that begin alike must not look fast; a deep cache, though, is filled once for all repetitions.
                prefix_cache="shared" if depth else "off",
            )
        with llm:
            loaded = time.perf_counter() - started
            warn_of(llm.warnings)
            timed = _time_all(llm, work)
            abilities = llm._engine.call("measure", batches=list(batches) if any(work.counts) else [])
            stages = [each["load_stages"] for each in abilities]
            speeds = [each["memory_bytes_per_second"] for each in abilities]
            loads.append(Load(llm.plan.size, loaded, stages, speeds, llm.reductions()))
            results += [_judged(llm, result, abilities) for result in timed]
    report = {
        "model": model,
        "machine": machine(),
        "loads": [asdict(load) for load in loads],
        "results": [asdict(result) for result in results],
    }
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print(loads, results)


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


def _time_all(llm: LLM, work: Work) -> list[Result]:
    prefills = [_prefill(llm, length, work.repetitions) for length in work.prompts if length]
    decodes = [
        _decode(llm, size, count, work.depth, work.repetitions)
        for size in work.batches
        for count in work.counts
        if count
    ]
    return prefills + decodes


def _prefill(llm: LLM, length: int, repetitions: int) -> Result:
    """Random ids, new ones every time; from giving the prompt to its first token."""
    seconds = [_first_token(_generate(llm, [_random_ids(llm, length, run)], 1)) for run in range(repetitions + 1)]
    warm = seconds[1:]
    speeds = [length / taken for taken in warm]
    return Result(
        *("prefill", llm.plan.size, 1, length, 0),
        *(statistics.median(speeds), min(speeds), max(speeds), statistics.median(warm)),
    )


def _decode(llm: LLM, batch: int, count: int, depth: int, repetitions: int) -> Result:
    """From one random token a sequence, or `depth` of them; end-of-text ignored. Timed from the arrival of the first
    token, which the prompt's step makes, to that of the last, `count` steps later."""
    prompts = [_random_ids(llm, max(depth, 1), number) for number in range(batch)]
    _generate(llm, prompts, WARM_UP_TOKENS)  # and fills the cache
    speeds, firsts = [], []
    for _ in range(repetitions):
        outputs = _generate(llm, prompts, count + 1)
        metrics = [output.metrics for output in outputs if output.metrics is not None]
        started = min(each.first_token_time or 0.0 for each in metrics)
        ended = max(each.last_token_time or 0.0 for each in metrics)
        speeds.append(batch * count / (ended - started))
        firsts.append(_first_token(outputs))
    return Result(
        *("decode", llm.plan.size, batch, count, depth),
        *(statistics.median(speeds), min(speeds), max(speeds), statistics.median(firsts)),
    )


def _random_ids(llm: LLM, length: int, seed: int) -> list[int]:
    import numpy as np

    return np.random.default_rng(seed).integers(0, llm.plan.spec.vocab_size, length).tolist()


def _generate(llm: LLM, prompts: list[list[int]], count: int) -> list[RequestOutput]:
    from multitensor import SamplingParams

    return llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))


def _first_token(outputs: list[RequestOutput]) -> float:
    """Seconds from the first prompt's arrival to the last one's first token."""
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    return max(each.first_token_time or 0.0 for each in metrics) - min(each.arrival_time for each in metrics)


def _judged(llm: LLM, result: Result, abilities: list[dict[str, Any]]) -> Result:
    """The same with what a decode's speed means on these devices."""
    from multitensor.sharding.traffic import decode_bytes

    if result.test != "decode":
        return result
    step = result.batch / result.tokens_per_second
    context = max(result.depth, 1) + (result.tokens + 1) / 2  # on average, while it is timed
    moved = [decode_bytes(llm.plan, rank, result.batch, context) for rank in llm.plan.ranks]
    speeds = [each["memory_bytes_per_second"] for each in abilities]
    floor = max(nbytes / speed for nbytes, speed in zip(moved, speeds, strict=True)) if all(speeds) else None
    reducing = max(each["reduction_seconds"][result.batch] for each in abilities)
    return replace(
        result,
        bytes_per_step=max(moved),
        bytes_per_second=max(moved) / step,
        floor_percent=None if floor is None else 100 * floor / step,
        reduction_percent=100 * reducing / step,
    )


def _print(loads: list[Load], results: list[Result]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width to fold a table for
    titles = ("test", "ranks", "batch", "tokens/s", "slowest", "fastest", "TB/s a rank", "of floor", "reducing")
    table = Table(*(Column(title, no_wrap=True) for title in titles), box=box.MARKDOWN)
    for r in results:
        name = f"{r.test} {r.tokens}" + (f" at {r.depth}" if r.depth else "")
        speeds = (f"{x:,.1f}" for x in (r.tokens_per_second, r.slowest, r.fastest))
        moved = f"{r.bytes_per_second / 1e12:.3g}" if r.bytes_per_second else ""
        table.add_row(
            *(name, str(r.ranks), str(r.batch), *speeds, moved),
            *(_percent(r.floor_percent), _percent(r.reduction_percent)),
        )
    console.print(table)
    for load in loads:
        reads = ", ".join(f"{x / 1e12:.3g}" if x else "?" for x in load.memory_bytes_per_second)
        longest = {name: max(each[name] for each in load.stages) for name in load.stages[0]}
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in longest.items())
        console.print(f"{load.ranks} rank(s): loaded in {load.load_seconds:.1f} s (longest: {stages})")
        console.print(f"memory is read at {reads} TB/s")
        _print_reductions(console, load.reductions)


def _print_reductions(console: Console, reductions: dict[str, Any]) -> None:
    for rows, ways in reductions["microseconds"].items():
        times = ", ".join(f"{way} {microseconds:.1f}" for way, microseconds in ways.items())
        console.print(f"sum over ranks with its norm, {rows} row(s), microseconds: {times}")
    if reductions["why"] or reductions["microseconds"]:
        why = f": {reductions['why']}" if reductions["why"] else ""
        console.print(f"small sums take {reductions['small']}{why}")
    for rows, ways in reductions["large_microseconds"].items():
        times = ", ".join(f"{way} {microseconds:.0f}" for way, microseconds in ways.items())
        console.print(f"sum over ranks of {rows} rows, microseconds: {times}")
    if reductions["large_why"] or reductions["large_microseconds"]:
        why = f": {reductions['large_why']}" if reductions["large_why"] else ""
        console.print(f"large sums take {reductions['large']}{why}")
    if reductions["overlapped_from"]:
        console.print(f"sums of {reductions['overlapped_from']} tokens and more travel while products are computed")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}%"
