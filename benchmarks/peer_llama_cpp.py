"""multitensor and llama.cpp on the same machine, in the same run, over the same GGUF file: one table, one JSON.

    python benchmarks/peer_llama_cpp.py --model 8b-q4.gguf --llama-bench llama/build/bin/llama-bench \
        --tests decode:1,decode:4,prefill:512 --tp 1,2 --json result.json

Ours is `python -m multitensor bench`. Theirs is llama-bench for prefill and for the decode of one sequence, and
llama-batched-bench, which lies beside it, for several; with more than one GPU it is measured under `-sm layer` and
`-sm tensor`, and the ratio is against the faster of the two. `build_llama_cpp.sh` builds both programs. Medians of
--repetitions runs, after a warm-up. On a machine without GPUs: --devices cpu:1 --ngl 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Test:
    """kind: `decode` of `number` sequences together, or `prefill` of `number` tokens."""

    kind: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.number}"


@dataclass(frozen=True)
class Speed:
    """Tokens a second, all sequences together."""

    median: float
    slowest: float
    fastest: float


@dataclass(frozen=True)
class Row:
    """theirs: speed by split mode. ratio: ours over their fastest mode; None where a side is missing."""

    test: str
    ranks: int
    ours: Speed | None
    theirs: dict[str, Speed]
    ratio: float | None


def parse_tests(text: str) -> tuple[Test, ...]:
    tests = []
    for part in filter(None, text.split(",")):
        kind, _, number = part.strip().partition(":")
        if kind not in ("decode", "prefill") or not number.isdigit() or int(number) < 1:
            raise ValueError(f"--tests: {part!r} is not like decode:4 or prefill:512")
        tests.append(Test(kind, int(number)))
    if not tests:
        raise ValueError("--tests: none given")
    return tuple(tests)


def split_modes(ranks: int) -> tuple[str, ...]:
    return ("none",) if ranks == 1 else ("layer", "tensor")


def run(command: Sequence[str], environment: dict[str, str], timeout: float) -> str:
    """Standard output; raises RuntimeError with the end of standard error."""
    print("$", " ".join(command), file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]}: no result within {timeout:.0f} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def speed_of(samples: Sequence[float]) -> Speed:
    return Speed(statistics.median(samples), min(samples), max(samples))


# ---- ours ----


def our_command(options: argparse.Namespace, tests: Sequence[Test], ranks: int) -> list[str]:
    prompts = [str(t.number) for t in tests if t.kind == "prefill"] or ["0"]
    batches = [str(t.number) for t in tests if t.kind == "decode"]
    command = [sys.executable, "-m", "multitensor", "bench", str(options.model), "--json"]
    command += [
        "-p",
        ",".join(prompts),
        "-n",
        str(options.generate if batches else 0),
        "-b",
        ",".join(batches or ["1"]),
    ]
    command += ["-r", str(options.repetitions)]
    return command + (["--devices", options.devices] if options.devices else ["--tp", str(ranks)]) + options.our_args


def our_speeds(report: dict[str, Any]) -> dict[str, Speed]:
    """What `multitensor bench --json` printed, by name of the test."""
    speeds = {}
    for r in report["results"]:
        name = Test(r["test"], r["tokens"] if r["test"] == "prefill" else r["batch"]).name
        speeds[name] = Speed(r["tokens_per_second"], r["slowest"], r["fastest"])
    return speeds


# ---- theirs ----


def common_arguments(options: argparse.Namespace, mode: str) -> list[str]:
    arguments = ["-m", str(options.model), "-ngl", str(options.ngl), "-sm", mode]
    arguments += ["-t", str(options.threads)] if options.threads else []
    return arguments + options.llama_args


def llama_bench_command(options: argparse.Namespace, test: Test, mode: str) -> list[str]:
    work = ["-p", str(test.number), "-n", "0"] if test.kind == "prefill" else ["-p", "0", "-n", str(options.generate)]
    common = common_arguments(options, mode)
    return [str(options.llama_bench), *common, "-fa", "1", *work, "-r", str(options.repetitions), "-o", "json"]


def llama_bench_speed(output: str) -> Speed:
    """samples_ts are the speeds of the single repetitions; llama-bench itself prints their mean."""
    (result,) = json.loads(output)
    return speed_of(result["samples_ts"])


def batched_bench_command(options: argparse.Namespace, test: Test, mode: str) -> list[str]:
    """Prompts of one token each, as ours; the batch is named once for each repetition, and once to warm up."""
    context = test.number * (-(-(options.generate + 16) // 256) * 256)
    batches = ",".join([str(test.number)] * (options.repetitions + 1))
    work = ["-npp", "1", "-ntg", str(options.generate), "-npl", batches, "-c", str(context)]
    program = options.llama_bench.with_name("llama-batched-bench")
    return [str(program), *common_arguments(options, mode), "-fa", "on", *work, "--output-format", "jsonl"]


def batched_bench_speed(output: str, repetitions: int) -> Speed:
    rows = [json.loads(line) for line in output.splitlines() if line.lstrip().startswith("{")]
    if len(rows) != repetitions + 1:
        raise RuntimeError(f"llama-batched-bench printed {len(rows)} results, not {repetitions + 1}")
    return speed_of([row["speed_tg"] for row in rows[1:]])


def their_speed(options: argparse.Namespace, test: Test, mode: str, environment: dict[str, str]) -> Speed:
    if test.kind == "decode" and test.number > 1:
        output = run(batched_bench_command(options, test, mode), environment, options.timeout)
        return batched_bench_speed(output, options.repetitions)
    return llama_bench_speed(run(llama_bench_command(options, test, mode), environment, options.timeout))


# ---- both ----


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Side by side for each number of ranks; a side that fails is reported, and the others go on."""
    rows: list[Row] = []
    errors: list[str] = []
    machine: dict[str, Any] = {}

    def attempt(what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (RuntimeError, OSError, ValueError) as error:
            errors.append(f"{what}: {error}")
            print(errors[-1], file=sys.stderr, flush=True)
            return None

    for ranks in options.tp:
        visible = {} if options.devices else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(ranks)))}
        environment = {**os.environ, **visible}
        command = our_command(options, options.tests, ranks)
        report = attempt(
            f"multitensor, {ranks} ranks",
            lambda c=command, e=environment: json.loads(run(c, e, options.timeout)),  # type: ignore[misc]
        )
        ours = our_speeds(report) if report else {}
        machine = report["machine"] if report else machine
        for test in options.tests:
            theirs: dict[str, Speed] = {}
            for mode in split_modes(ranks):
                found = attempt(
                    f"llama.cpp -sm {mode}, {ranks} devices, {test.name}",
                    lambda t=test, m=mode, e=environment: their_speed(options, t, m, e),  # type: ignore[misc]
                )
                if found:
                    theirs[mode] = found
            rows.append(make_row(test.name, ranks, ours.get(test.name), theirs))
    return {
        "model": options.model.name,
        "model_bytes": options.model.stat().st_size,
        "repetitions": options.repetitions,
        "generated_tokens": options.generate,
        "machine": {**hardware(), "multitensor": machine},
        "llama_cpp": build_info(options.llama_bench),
        "results": [asdict(row) for row in rows],
        "errors": errors,
    }


def make_row(test: str, ranks: int, ours: Speed | None, theirs: dict[str, Speed]) -> Row:
    best = max((speed.median for speed in theirs.values()), default=0.0)
    return Row(test, ranks, ours, theirs, ours.median / best if ours and best else None)


def hardware() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        gpus = []
    return {"system": platform.platform(), "cores": os.cpu_count(), "gpus": gpus}


def build_info(llama_bench: Path) -> str:
    """What build_llama_cpp.sh wrote beside the program."""
    path = llama_bench.with_name("build_info.txt")
    return path.read_text().strip() if path.is_file() else "built otherwise"


def table(report: dict[str, Any]) -> str:
    """Markdown; llama.cpp's column names the split mode of its faster figure."""

    def cell(speed: dict[str, float] | None) -> str:
        return f"{speed['median']:,.1f} ({speed['slowest']:,.1f} to {speed['fastest']:,.1f})" if speed else "failed"

    lines = ["| test | ranks | multitensor, tok/s | llama.cpp, tok/s | ratio |", "|---|---|---|---|---|"]
    for row in report["results"]:
        theirs = "; ".join(f"-sm {mode} {cell(speed)}" for mode, speed in row["theirs"].items()) or "failed"
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
        lines.append(f"| {row['test']} | {row['ranks']} | {cell(row['ours'])} | {theirs} | {ratio} |")
    return "\n".join(lines)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--tests", default="decode:1,decode:4,prefill:512")
    parser.add_argument("--tp", default="1", help="numbers of GPUs, as 1,2")
    parser.add_argument("--generate", type=int, default=128, help="tokens to decode")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--devices", help="of ours instead of --tp, as cpu:1")
    parser.add_argument("--ngl", type=int, default=999, help="llama.cpp's layers on the GPU")
    parser.add_argument("--threads", type=int, help="llama.cpp's CPU threads")
    parser.add_argument("--our-args", default="", help="more options of `multitensor bench`, separated by spaces")
    parser.add_argument("--llama-args", default="", help="more options of llama.cpp's programs, separated by spaces")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one command")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(given)
    try:
        options.tests = parse_tests(options.tests)
        options.tp = tuple(int(part) for part in options.tp.split(","))
    except ValueError as error:
        parser.error(str(error))
    options.our_args, options.llama_args = options.our_args.split(), options.llama_args.split()
    for path in (options.model, options.llama_bench):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    return options


def main() -> int:
    options = arguments()
    report = measure(options)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
