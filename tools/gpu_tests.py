"""Runs the tests that need GPUs, dealt over the GPUs that are here, several processes on each: compiling takes most of
their time, and it takes one core. Whoever has lent a machine for minutes learns in a given time as much as it allows.

    python tools/gpu_tests.py                      # all
    python tools/gpu_tests.py -k "layer or peer" --limit 240 --logs logs --json result.json

Tests of one GPU run --per-gpu at a time on each; those of two, --pairs at a time over all. What is not over when
--limit seconds have passed is ended, and told as not run. Files that cannot be collected here (for want of a
package, say) are told, and the others run. Exit status 1 if a test failed, or anything was not collected or not run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
_RESULT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_LAST_WORDS = 5.0  # seconds
_PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "--strict-markers"]


@dataclass
class Batch:
    """Tests of one function, for one process. outcomes: by test, of those that are over."""

    tests: list[str]
    number: int
    outcomes: dict[str, str] = field(default_factory=dict)
    ended: str = ""  # why, if not by itself


def marked_files(marker: str, folder: Path = ROOT / "tests") -> list[str]:
    """Test files that mention the marker, or import a module of the tests that does; relative to the root."""
    texts = {path: path.read_text() for path in sorted(folder.rglob("*.py"))}
    wanted = rf"\bmark\.{marker}\b"
    lenders = [path.stem for path, text in texts.items() if not _is_test(path) and re.search(wanted, text)]
    for name in lenders:
        wanted += rf"|^(?:from|import) {name}\b"
    pattern = re.compile(wanted, re.MULTILINE)
    return [str(path.relative_to(ROOT)) for path, text in texts.items() if _is_test(path) and pattern.search(text)]


def _is_test(path: Path) -> bool:
    return path.name.startswith("test_")


def collect(marker: str, keyword: str, size: int) -> tuple[list[Batch], list[str]]:
    """(Every function's tests in batches of at most `size`, what could not be collected and why, a line each)."""
    files = marked_files(marker)
    if not files:
        return [], []
    command = [*_PYTEST, "--collect-only", "-q", "--continue-on-collection-errors", "-m", marker]
    command += [*(["-k", keyword] if keyword else []), *files]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    broken = [f"{name}: {why}" for name, why in _errors(lines).items()]
    if result.returncode not in (0, 5) and not broken:  # 5: none was found
        broken = [f"tests marked {marker}: {' '.join((result.stdout + result.stderr).split())[-1000:]}"]
    functions: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if "::" in line and not line.startswith("ERROR "):
            functions[line.partition("[")[0]].append(line)
    batches = [Batch(tests[at : at + size], 0) for tests in functions.values() for at in range(0, len(tests), size)]
    return batches, broken


def _errors(lines: list[str]) -> dict[str, str]:
    """By file that could not be collected: the last line of its error."""
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if match := re.match(r"_+ ERROR collecting (\S+) _+$", line):
            name = match.group(1)
            found[name] = "no reason was given"
        elif name and line.startswith("E   "):
            found[name] = line[4:].strip()
        elif line.startswith("="):
            name = ""
    return found


async def end(process: asyncio.subprocess.Process) -> None:
    """With a moment in which pytest tells why tests failed so far, and ends what the test under way has started."""
    process.send_signal(signal.SIGINT)
    try:
        await asyncio.wait_for(process.wait(), _LAST_WORDS)
    except TimeoutError:
        process.kill()
        await process.wait()


async def run(batch: Batch, devices: str, deadline: float, logs: Path) -> None:
    left = deadline - time.monotonic()
    if left < 1:
        batch.ended = "no time was left"
        return
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices, "PYTHONUNBUFFERED": "1"}
    with (logs / f"{batch.number:03}.log").open("wb") as log:
        command = [*_PYTEST, "-v", "-rfE", "--tb=short", "-o", f"timeout={int(left) + 60}", *batch.tests]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            await asyncio.wait_for(process.wait(), left)
        except TimeoutError:
            batch.ended = "the time was over"
            await end(process)
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
    ones, broken = collect("gpu", options.keyword, options.size)
    twos, more = collect("gpu2", options.keyword, options.size) if len(gpus) > 1 else ([], [])
    broken += [line for line in more if line not in broken]
    for line in broken:
        print(f"not collected: {line}", file=sys.stderr, flush=True)
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
        options.json.write_text(json.dumps({"files": files, "failures": failures, "not collected": broken}, indent=1))
    sys.exit(bool(broken) or any(set(counts) & {"failed", "error", "not run"} for counts in files.values()))


if __name__ == "__main__":
    main()
