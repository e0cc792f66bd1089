"""The server under many clients: are streams lost or crossed, and does memory stay flat?

    python benchmarks/soak_server.py --model smollm2-135m-q4_1.gguf --devices cpu:2 --streams 200 --requests 2000

Starts `multitensor serve` on a free port of loopback. First every prompt is asked alone, then all of them at once: a
stream must say what the same request said alone, until a place where the two likeliest tokens there were less than
0.1 nat apart (batches of other sizes round differently, and may then take the other one). Afterwards requests come
without pause, and half of the clients hang up at random: before the first token or after a few. Meanwhile the memory of
the server and of its ranks is read; flat means that in the last quarter it is no more than 2% above the second quarter.
At the end nothing may be left running, waiting or held. Exit status 1 if any of this does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from served_model import Server

NEAR_TIE = 0.1  # nat
GROWTH = 0.02
THINGS = ("tree", "ship", "clock", "river", "horse", "lamp", "bread", "tower", "glass", "wolf", "stone", "book", "rain")
PLACES = ("Paris", "Oslo", "Lima", "Cairo", "Kyoto", "Delhi", "Rome", "Quito", "Dakar", "Perth", "Lyon", "Turin")


@dataclass
class Answer:
    """Of one stream. margins: log-probability of the likeliest token less that of the next, at each place."""

    tokens: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finish: str | None = None
    done: bool = False


def memory_of(server: Server) -> dict[str, int]:
    """Bytes of their own: of the server's process, and of its ranks together. Shares of shared pages are left out:
    they change with every other program that uses the same libraries."""
    process = psutil.Process(server.process.pid)
    ranks = sum(child.memory_full_info().uss for child in process.children(recursive=True))
    return {"server": process.memory_full_info().uss, "ranks": ranks}


def prompt_of(number: int) -> str:
    thing, place = THINGS[number % len(THINGS)], PLACES[number // len(THINGS) % len(PLACES)]
    return f"Story {number}. There was a {thing} in {place} that"


def body_of(number: int, tokens: int) -> dict[str, Any]:
    return {"prompt": prompt_of(number), "max_tokens": tokens, "temperature": 0, "stream": True, "logprobs": 2}


async def ask(client: httpx.AsyncClient, number: int, tokens: int, leave_after: int | None = None) -> Answer:
    """leave_after: hangs up after so many tokens; 0: as soon as the answer begins."""
    answer = Answer()
    async with client.stream("POST", "/v1/completions", json=body_of(number, tokens)) as response:
        response.raise_for_status()
        if leave_after == 0:
            return answer
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.done = True
            elif line.startswith("data: "):
                take(answer, json.loads(line[6:]))
            if leave_after is not None and len(answer.tokens) >= leave_after:
                break
    return answer


def take(answer: Answer, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        raise RuntimeError(f"the stream ended with {chunk['error']}")
    for choice in chunk["choices"]:
        answer.finish = choice["finish_reason"] or answer.finish
        logprobs = choice["logprobs"] or {"tokens": [], "top_logprobs": []}
        answer.tokens += logprobs["tokens"]
        for best in logprobs["top_logprobs"]:
            values = sorted(best.values(), reverse=True)
            answer.margins.append(values[0] - values[1] if len(values) > 1 else 0.0)


def parting(alone: Answer, together: Answer) -> float | None:
    """The margin where they part; None if they are equal; infinite if one only ends before the other."""
    if (alone.tokens, alone.finish) == (together.tokens, together.finish):
        return None
    pairs = zip(alone.tokens, together.tokens, alone.margins, strict=False)
    return next((margin for mine, other, margin in pairs if mine != other), math.inf)


async def check_streams(client: httpx.AsyncClient, streams: int, tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    alone = [await ask(client, number, tokens) for number in range(streams)]
    middle = time.perf_counter()
    together = await asyncio.gather(*(ask(client, number, tokens) for number in range(streams)))
    ended = time.perf_counter()
    partings = [parting(one, other) for one, other in zip(alone, together, strict=True)]
    margins = sorted(margin for margin in partings if margin is not None)
    return {
        "streams": streams,
        "distinct_answers": len({tuple(answer.tokens) for answer in alone}),
        "lost": sum(not (answer.done and answer.finish) for answer in (*alone, *together)),
        "equal": streams - len(margins),
        "equal_until_a_near_tie": sum(margin < NEAR_TIE for margin in margins),
        "different": sum(margin >= NEAR_TIE for margin in margins),
        "margins": margins,
        "seconds_alone": middle - started,
        "seconds_together": ended - middle,
        "tokens": sum(len(answer.tokens) for answer in together),
    }


async def soak(server: Server, client: httpx.AsyncClient, requests: int, at_once: int, tokens: int) -> dict[str, Any]:
    """Half of the clients hang up. Memory is read 40 times."""
    rng = random.Random(7)
    leaving = [rng.randrange(0, tokens) if rng.random() < 0.5 else None for _ in range(requests)]
    numbers = iter(range(requests))
    finished, broken = 0, 0
    memory: list[dict[str, int]] = []

    async def worker() -> None:
        nonlocal finished, broken
        for number in numbers:
            answer = await ask(client, rng.randrange(100_000), tokens, leaving[number])
            broken += leaving[number] is None and not answer.done
            finished += 1
            if finished % max(requests // 40, 1) == 0:
                memory.append(await asyncio.to_thread(memory_of, server))

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return {
        "requests": requests,
        "at_once": at_once,
        "hung_up": sum(leave is not None for leave in leaving),
        "lost": broken,
        "seconds": time.perf_counter() - started,
        "memory": memory,
        "growth": {name: growth([sample[name] for sample in memory]) for name in memory[0]},
    }


def growth(values: list[int]) -> float:
    """Of the last quarter over the second: caches and pools have filled by then."""
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) / statistics.median(values[quarter : 2 * quarter]) - 1


async def rest(client: httpx.AsyncClient) -> dict[str, Any]:
    """The server's figures once it has nothing to do; those after 30 s if it never comes to rest."""
    for _ in range(300):
        stats: dict[str, Any] = (await client.get("/v1/stats")).json()
        if stats["running"] == stats["waiting"] == stats["kv_used"] == 0:
            break
        await asyncio.sleep(0.1)
    return {name: stats[name] for name in ("running", "waiting", "kv_used", "kv_cached", "kv_total")}


async def run(server: Server, url: str, options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.streams)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        await ask(client, 0, 2)
        streams = await check_streams(client, options.streams, options.tokens)
        soaked = await soak(server, client, options.requests, options.at_once, options.soak_tokens)
        return {"streams": streams, "soak": soaked, "at_rest": await rest(client)}


def faults(found: dict[str, Any]) -> list[str]:
    """What does not hold."""
    streams, soaked, resting = found["streams"], found["soak"], found["at_rest"]
    result = [f"{part['lost']} streams lost" for part in (streams, soaked) if part["lost"]]
    if streams["different"]:
        result.append(f"{streams['different']} streams differ from the same request alone")
    result += [f"memory of {name} grew by {by:.1%}" for name, by in soaked["growth"].items() if by > GROWTH]
    result += [f"{resting[name]} {name} at rest" for name in ("running", "waiting", "kv_used") if resting[name]]
    return result


def report(found: dict[str, Any]) -> Iterable[str]:
    streams, soaked = found["streams"], found["soak"]
    yield (
        f"{streams['streams']} streams at once: {streams['equal']} equal, "
        f"{streams['equal_until_a_near_tie']} equal until a near tie, "
        f"{streams['different']} different (at up to {max(streams['margins'], default=0):.2f} nat), "
        f"{streams['lost']} lost; {streams['distinct_answers']} distinct answers; "
        f"{streams['seconds_together']:.1f} s together, {streams['seconds_alone']:.1f} s one after the other"
    )
    yield (
        f"{soaked['requests']} requests, {soaked['at_once']} at a time, {soaked['hung_up']} hung up: "
        f"{soaked['lost']} lost, {soaked['seconds']:.0f} s"
    )
    for name, by in soaked["growth"].items():
        values = [sample[name] / 2**20 for sample in soaked["memory"]]
        first, most, last = values[0], max(values), values[-1]
        yield f"  {name:7} {first:7.1f} MiB first, {most:7.1f} most, {last:7.1f} last; growth {by:+.2%}"
    yield f"at rest: {found['at_rest']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--soak-tokens", type=int, default=6)
    parser.add_argument("--parallel", type=int, default=200, help="sequences in one step at most")
    parser.add_argument("--dtype", default="float32", help="float32: no activation is rounded to 8 bits")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = ["--devices", options.devices, "--dtype", options.dtype]
    server = Server(options.model, "soak", [*chosen, "--ctx", "512", "--parallel", str(options.parallel)])
    try:
        found = asyncio.run(run(server, server.url(), options))
    finally:
        server.end()
    for line in report(found):
        print(line)
    wrong = faults(found)
    print("; ".join(wrong) if wrong else "all holds")
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": None, **found, "faults": wrong}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
