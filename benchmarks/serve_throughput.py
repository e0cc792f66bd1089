"""Many streams through HTTP against the engine alone, and beside llama.cpp's batched bench, in one run.

    python benchmarks/serve_throughput.py --model 8b-q4.gguf --tp 2 --streams 64 --prompt 512 --generate 128 \
        --batched-bench llama/build/bin/llama-batched-bench --json result.json

The same work thrice: `--streams` prompts of `--prompt` random ids each, `--generate` tokens of each, all at once. First
the engine alone (`LLM.generate`), then `multitensor serve` with one streaming client a prompt in a process of its own,
then llama-batched-bench where it is given. Throughput counts generated tokens over the whole time, prefill included;
medians of --repetitions after a warm-up. Of the streams also the time to the first token and between tokens, median and
99th percentile. Exit status 1 if HTTP keeps less than 90% of the engine's own throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from served_model import Server

KEPT = 0.9


def prompts(options: argparse.Namespace, vocabulary: int, seed: int) -> list[list[int]]:
    choose = random.Random(seed)
    return [[choose.randrange(vocabulary) for _ in range(options.prompt)] for _ in range(options.streams)]


def ours(options: argparse.Namespace) -> list[str]:
    """Options of both sides: enough context and slots for all streams at once."""
    context = -(-(options.prompt + options.generate + 16) // 256) * 256
    devices = ["--devices", options.devices] if options.devices else ["--tp", str(options.tp)]
    return [*devices, "--ctx", str(context)]


def engine_alone(options: argparse.Namespace) -> dict[str, Any]:
    from multitensor import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=options.generate, ignore_eos=True)
    where: dict[str, Any] = {"devices": options.devices} if options.devices else {"tensor_parallel_size": options.tp}
    speeds = []
    context = int(ours(options)[-1])
    with LLM._open(options.model, max_model_len=context, max_num_seqs=options.streams, **where) as llm:
        vocabulary = llm.plan.spec.vocab_size
        for turn in range(options.repetitions + 1):
            started = time.perf_counter()
            outputs = llm.generate(prompts(options, vocabulary, turn), params)
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            speeds.append(tokens / (time.perf_counter() - started))
    return {"vocabulary": vocabulary, **spread(speeds[1:])}


def spread(speeds: Sequence[float]) -> dict[str, float]:
    return {"tokens_per_second": statistics.median(speeds), "slowest": min(speeds), "fastest": max(speeds)}


async def stream(host: str, port: int, ids: list[int], generate: int) -> tuple[float, list[float]]:
    """(seconds to the first token, seconds between tokens) of one request, over a connection of its own. Written by
    hand: a client library takes more time for a token than the server, and would be what is measured. Raises
    RuntimeError where tokens lack."""
    body = {"model": "bench", "prompt": ids, "max_tokens": generate, "temperature": 0, "stream": True}
    content = json.dumps(body | {"ignore_eos": True, "logprobs": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    started, times, status = time.perf_counter(), [], b""
    try:
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r}: {(await reader.read(2000))[-300:]!r}")
        async for line in reader:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                found = choices[0]["logprobs"]["tokens"] if choices and choices[0].get("logprobs") else []
                times += [time.perf_counter()] * len(found)
    finally:
        writer.close()
    if len(times) != generate:
        raise RuntimeError(f"{len(times)} tokens came, not {generate}")
    return times[0] - started, [after - before for before, after in itertools.pairwise(times)]


async def all_streams(url: str, work: list[list[list[int]]], generate: int) -> list[dict[str, Any]]:
    where = urlsplit(url)
    host, port = where.hostname or "", where.port or 80
    results = []
    for batch in work:
        started = time.perf_counter()
        found = await asyncio.gather(*(stream(host, port, ids, generate) for ids in batch))
        seconds = time.perf_counter() - started
        results.append(
            {
                "tokens_per_second": len(batch) * generate / seconds,
                "first": [first for first, _ in found],
                "between": [gap for _, gaps in found for gap in gaps],
            }
        )
    return results


def through_http(options: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """The clients run in a process of their own, so that they do not take the engine's time."""
    server = Server(options.model, "bench", [*ours(options), "--parallel", str(options.streams)])
    try:
        work = [prompts(options, vocabulary, turn) for turn in range(options.repetitions + 1)]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump({"url": server.url(), "work": work, "generate": options.generate}, file)
            file.flush()
            command = [sys.executable, __file__, "--clients", file.name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
        if done.returncode != 0:
            raise RuntimeError(f"the clients failed: {done.stderr.strip()[-500:]}; the server said: {server.said}")
        results = json.loads(done.stdout)[1:]
    finally:
        server.end()
    report: dict[str, Any] = spread([result["tokens_per_second"] for result in results])
    for name in ("first", "between"):
        values = sorted(value for result in results for value in result[name])
        report[name] = {"p50": values[len(values) // 2], "p99": values[min(len(values) - 1, 99 * len(values) // 100)]}
    return report


def llama_cpp(options: argparse.Namespace) -> dict[str, float]:
    batches = ",".join([str(options.streams)] * (options.repetitions + 1))
    context = options.streams * (-(-(options.prompt + options.generate + 16) // 256) * 256)
    command = [options.batched_bench, "-m", options.model, "-ngl", str(options.ngl), "-fa", "on", "-c", str(context)]
    command += ["-sm", "tensor" if options.tp > 1 else "none", "-npp", str(options.prompt)]
    command += ["-ntg", str(options.generate), "-npl", batches, "--output-format", "jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    if done.returncode != 0:
        raise RuntimeError(f"llama-batched-bench ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.lstrip().startswith("{")]
    return spread([options.streams * options.generate / (row["t_pp"] + row["t_tg"]) for row in rows[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--devices", help="instead of --tp, as cpu:2")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--generate", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--batched-bench", help="llama-batched-bench, to run beside")
    parser.add_argument("--ngl", type=int, default=99, help="llama.cpp's layers on the GPU")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one side")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clients", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clients:
        asked = json.loads(options.clients.read_text())
        print(json.dumps(asyncio.run(all_streams(asked["url"], asked["work"], asked["generate"]))))
        return 0
    if not options.model:
        parser.error("--model is needed")
    alone = engine_alone(options)
    http = through_http(options, alone["vocabulary"])
    kept = http["tokens_per_second"] / alone["tokens_per_second"]
    report = {"engine": alone, "http": http, "http_over_engine": kept}
    if options.batched_bench:
        report["llama_cpp"] = llama_cpp(options)
    print(f"{options.streams} streams, {options.prompt} tokens in, {options.generate} out; tokens/s")
    for name in ("engine", "http", "llama_cpp"):
        if name in report:
            row: Any = report[name]
            print(f"  {name:<10}{row['tokens_per_second']:10.1f}  ({row['slowest']:.1f} to {row['fastest']:.1f})")
    print(f"HTTP keeps {100 * kept:.1f}% of the engine's own; asked for: {100 * KEPT:.0f}%")
    for name, label in (("first", "to the first token"), ("between", "between tokens")):
        print(f"  {label}: p50 {1e3 * http[name]['p50']:.1f} ms, p99 {1e3 * http[name]['p99']:.1f} ms")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 0 if kept >= KEPT else 1


if __name__ == "__main__":
    sys.exit(main())
