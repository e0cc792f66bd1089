"""Runs the tests that need GPUs, dealt over the GPUs that are here, several processes on each: compiling takes most of
their time, and it takes one core. Whoever has lent a machine for minutes learns in a given time as much as it allows.

    python tools/gpu_tests.py                      # all
    python tools/gpu_tests.py -k "layer or peer" --limit 240 --logs logs --json result.json

Tests of one GPU run --per-gpu at a time on each; those of two, --pairs at a time over all. What is not over when
--limit seconds have passed is ended, and told as not run. Exit status 1 if a test failed, or anything was not run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
_RESULT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "--strict-markers"]


@dataclass
class Batch:
    """Tests of one function, for one process. outcomes: by test, of those that are over."""

    tests: list[str]
    number: int
    outcomes: dict[str, str] = field(default_factory=dict)
    ended: str = ""  # why, if not by itself


def collect(marker: str, keyword: str, size: int) -> list[Batch]:
    """Every function's tests in batches of at most `size`. Raises SystemExit where they cannot be collected."""
    command = [*_PYTEST, "--collect-only", "-q", "-m", marker, *(["-k", keyword] if keyword else []), "tests"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode not in (0, 5):  # 5: none was found
        raise SystemExit(f"the tests cannot be collected:\n{result.stdout[-3000:]}{result.stderr[-1000:]}")
    functions: dict[str, list[str]] = defaultdict(list)
    for line in result.stdout.splitlines():
        if "::" in line:
            functions[line.partition("[")[0]].append(line)
    return [Batch(tests[at : at + size], 0) for tests in functions.values() for at in range(0, len(tests), size)]


async def run(batch: Batch, devices: str, deadline: float, logs: Path) -> None:
    left = deadline - time.monotonic()
    if left < 1:
        batch.ended = "no time was left"
        return
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices, "PYTHONUNBUFFERED": "1"}
    with (logs / f"{batch.number:03}.log").open("wb") as log:
        command = [*_PYTEST, "-v", "-rfE", "--tb=short", "-o", f"timeout={max(int(left), 1)}", *batch.tests]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            await asyncio.wait_for(process.wait(), left)
        except TimeoutError:
            batch.ended = "the time was over"
            process.kill()
            await process.wait()
    for line in (logs / f"{batch.number:03}.log").read_text(errors="replace").splitlines():
        if match := _RESULT.match(line):
            batch.outcomes[match.group(1)] = match.group(2)
    if not batch.ended and process.returncode not in (0, 1):
        batch.ended = f"exit status {process.returncode}"


async def work(queue: list[Batch], devices: str, deadline: float, logs: Path) -> None:
    while queue:
        batch = queue.pop(0)
        await run(batch, devices, deadline, logs)
        counts = Counter(batch.outcomes.values())
        told = ", ".join(f"{count} {what.lower()}" for what, count in sorted(counts.items())) or "nothing"
        print(f"GPU {devices}: {batch.tests[0].partition('[')[0]}: {told} {batch.ended}", file=sys.stderr, flush=True)


async def run_all(ones: list[Batch], twos: list[Batch], gpus: list[str], options: argparse.Namespace) -> None:
    deadline = time.monotonic() + options.limit
    queue, pairs = list(ones), list(twos)
    workers = [work(queue, gpu, deadline, options.logs) for gpu in gpus for _ in range(options.per_gpu)]
    workers += [work(pairs, ",".join(gpus), deadline, options.logs) for _ in range(options.pairs)]
    await asyncio.gather(*workers)


def visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [number for number in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if number]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def report(batches: list[Batch]) -> dict[str, dict[str, int]]:
    """By file: how many tests had which outcome."""
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for batch in batches:
        for test in batch.tests:
            files[test.partition("::")[0]][batch.outcomes.get(test, "NOT RUN").lower()] += 1
    return {name: dict(sorted(counts.items())) for name, counts in sorted(files.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="keyword", default="", help="as pytest's")
    parser.add_argument("--per-gpu", type=int, default=4, help="processes with tests of one GPU, on each")
    parser.add_argument("--pairs", type=int, default=2, help="processes with tests of two GPUs")
    parser.add_argument("--size", type=int, default=12, help="tests of a process at most")
    parser.add_argument("--limit", type=float, default=1800, help="seconds")
    parser.add_argument("--logs", type=Path, default=Path("gpu-test-logs"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gpus = visible_gpus()
    if not gpus:
        raise SystemExit("there is no CUDA device here")
    options.logs = options.logs.absolute()
    options.logs.mkdir(parents=True, exist_ok=True)
    ones = collect("gpu", options.keyword, options.size)
    twos = collect("gpu2", options.keyword, options.size) if len(gpus) > 1 else []
    for number, batch in enumerate([*ones, *twos]):
        batch.number = number
    asyncio.run(run_all(ones, twos, gpus, options))
    batches = [*ones, *twos]
    files = report(batches)
    for name, counts in files.items():
        print(f"{name}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    failures = sorted(t for b in batches for t, outcome in b.outcomes.items() if outcome in ("FAILED", "ERROR"))
    print(*(f"FAILED {test}" for test in failures), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"files": files, "failures": failures}, indent=1))
    sys.exit(any(set(counts) & {"failed", "error", "not run"} for counts in files.values()))


if __name__ == "__main__":
    main()
