"""The two sides of peer_llama_cpp.py: the command that measures tests, and what it printed, as speeds."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer_rows import Test


@dataclass(frozen=True)
class Speed:
    """Tokens a second, all sequences together; seconds for first_token. details: what our bench tells beside."""

    median: float
    slowest: float
    fastest: float
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Tests that share a model, its file, the GPUs and the settings, and so a load."""

    model: str
    path: Path
    ranks: int
    kv: str
    p2p: bool
    tests: tuple[Test, ...]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.ranks} GPU(s)" + f", {self.kv} cache" * bool(self.kv) + ", no P2P" * (not self.p2p)


def run(command: Sequence[str], environment: dict[str, str], timeout: float) -> str:
    """Standard output; raises RuntimeError with the end of standard error."""
    print("$", " ".join(command), file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]}: no result within {timeout:.0f} s") from None
    print(f"  {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def speed_of(samples: Sequence[float]) -> Speed:
    return Speed(statistics.median(samples), min(samples), max(samples))


# ---- ours ----


def our_devices(options: argparse.Namespace, group: Group) -> list[str]:
    devices = options.devices or (f"cpu:{group.ranks}" if options.cpu else "")
    chosen = ["--devices", devices] if devices else ["--tp", str(group.ranks)]
    chosen += ["--kv-type", group.kv] if group.kv else []
    return chosen + ([] if group.p2p else ["--no-p2p"]) + options.our_args


def our_command(options: argparse.Namespace, group: Group, tests: Sequence[Test]) -> list[str]:
    """One `bench` for prefills and for decodes of one depth."""
    prompts = [str(t.number) for t in tests if t.kind == "prefill"] or ["0"]
    batches = [str(t.number) for t in tests if t.kind == "decode"]
    depth = max(t.depth for t in tests)
    generate = options.generate if batches else 0
    command = [sys.executable, "-m", "multitensor", "bench", str(group.path), "--json"]
    command += ["-p", ",".join(prompts), "-n", str(generate), "-b", ",".join(batches or ["1"])]
    command += ["-d", str(depth)] if depth else []
    return [*command, "-r", str(options.repetitions), *our_devices(options, group)]


def our_speeds(report: dict[str, Any]) -> dict[str, Speed]:
    """What `multitensor bench --json` printed, by name of the test."""
    speeds = {}
    for r in report["results"]:
        prefill = r["test"] == "prefill"
        test = Test(r["test"], r["tokens"] if prefill else r["batch"], r.get("depth", 0))
        wanted = ("floor_percent", "reduction_percent", "bytes_per_second", "first_token_seconds")
        details = {key: r[key] for key in wanted if r.get(key) is not None}
        speeds[test.name] = Speed(r["tokens_per_second"], r["slowest"], r["fastest"], details)
    return speeds


def our_first_token(options: argparse.Namespace, group: Group, test: Test, environment: dict[str, str]) -> Speed:
    command = [sys.executable, "-m", "multitensor", "run", str(group.path), "--json", "--temp", "0"]
    command += ["--ids", "1,2,3,4", "-n", str(test.number), *our_devices(options, group)]
    report = json.loads(run(command, environment, options.timeout))
    seconds = float(report["first_token_seconds"])
    return Speed(seconds, seconds, seconds, {"load_seconds": float(report["load_seconds"])})


# ---- theirs ----


def common_arguments(options: argparse.Namespace, group: Group, mode: str) -> list[str]:
    arguments = ["-m", str(group.path), "-ngl", str(0 if options.cpu else options.ngl), "-sm", mode]
    arguments += ["-ctk", f"{group.kv}_0", "-ctv", f"{group.kv}_0"] if group.kv else []
    arguments += ["-t", str(options.threads)] if options.threads else []
    return arguments + options.llama_args


def llama_bench_command(options: argparse.Namespace, group: Group, tests: Sequence[Test], mode: str) -> list[str]:
    """Prefills and decodes of one sequence, all at one depth."""
    prompts = [str(t.number) for t in tests if t.kind == "prefill"] or ["0"]
    generate = options.generate if any(t.kind == "decode" for t in tests) else 0
    work = ["-p", ",".join(prompts), "-n", str(generate), "-d", str(tests[0].depth), "-r", str(options.repetitions)]
    return [str(options.llama_bench), *common_arguments(options, group, mode), "-fa", "1", *work, "-o", "json"]


def llama_bench_speeds(output: str) -> dict[str, Speed]:
    """samples_ts are the speeds of the single repetitions; llama-bench itself prints their mean."""
    speeds = {}
    for r in json.loads(output):
        test = Test("prefill", r["n_prompt"]) if r["n_prompt"] else Test("decode", 1, r["n_depth"])
        speeds[test.name] = speed_of(r["samples_ts"])
    return speeds


def batched_bench_command(options: argparse.Namespace, group: Group, tests: Sequence[Test], mode: str) -> list[str]:
    """Prompts of one token each, as ours; every batch is named once for each repetition, and once to warm up."""
    sizes = [test.number for test in tests]
    context = max(sizes) * (-(-(options.generate + 16) // 256) * 256)
    batches = ",".join(str(size) for size in sizes for _ in range(options.repetitions + 1))
    work = ["-npp", "1", "-ntg", str(options.generate), "-npl", batches, "-c", str(context)]
    program = options.llama_bench.with_name("llama-batched-bench")
    return [str(program), *common_arguments(options, group, mode), "-fa", "on", *work, "--output-format", "jsonl"]


def batched_bench_speeds(output: str, repetitions: int) -> dict[str, Speed]:
    found: dict[int, list[float]] = {}
    for line in output.splitlines():
        if line.lstrip().startswith("{"):
            row = json.loads(line)
            found.setdefault(row["pl"], []).append(row["speed_tg"])
    for size, samples in found.items():
        if len(samples) != repetitions + 1:
            raise RuntimeError(f"llama-batched-bench printed {len(samples)} results, not {repetitions + 1}, of {size}")
    return {Test("decode", size).name: speed_of(samples[1:]) for size, samples in found.items()}


def their_first_token(options: argparse.Namespace, group: Group, test: Test, mode: str, env: dict[str, str]) -> Speed:
    command = [str(options.llama_bench), *common_arguments(options, group, mode), "-fa", "1"]
    started = time.perf_counter()
    run([*command, "-p", "0", "-n", str(test.number), "-r", "1", "--no-warmup", "-o", "json"], env, options.timeout)
    seconds = time.perf_counter() - started
    return Speed(seconds, seconds, seconds)
