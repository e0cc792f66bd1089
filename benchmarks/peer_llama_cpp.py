"""multitensor and llama.cpp on the same machine, in the same run, over the same GGUF files: one table, one JSON.

    python benchmarks/peer_llama_cpp.py --model 8b-q4.gguf --llama-bench llama/build/bin/llama-bench \
        --tests decode:1,decode:4,prefill:512,decode:1@32768,first_token:1 --tp 1,2 --json result.json
    python benchmarks/peer_llama_cpp.py --rows issue3 --folder /dev/shm --llama-bench ... --json result.json

The second form makes a whole table of what is asked for (peer_rows.py), over synthetic models in --folder, which are
written there when they are missing. Model by model and number of GPUs by number of GPUs, ours runs first, then theirs.

Ours is `python -m multitensor bench`, once for all tests that can share a load. Theirs is llama-bench for prefill and
for the decode of one sequence, and llama-batched-bench, which lies beside it, for several; with more than one GPU under
each of --split-modes, the ratio being against the fastest. Without P2P theirs runs with each of its two reductions.
`build_llama_cpp.sh` builds both programs. Medians of --repetitions runs, after a warm-up. first_token is one run each,
from the start of the process: of `multitensor run`, and of llama-bench that decodes one token and ends.
On a machine without GPUs: --cpu; with --rehearse also tiny models and a shallow cache, to see that everything works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from peer_rows import PRESETS, Goal, Row, Test, parse_test, table
from peer_sides import (
    Group,
    Speed,
    batched_bench_command,
    batched_bench_speeds,
    llama_bench_command,
    llama_bench_speeds,
    our_command,
    our_first_token,
    our_speeds,
    run,
    their_first_token,
)

SHALLOW = 64  # a rehearsal's cache is so many times less deep
ALL_REDUCES = ("nccl", "internal")  # llama.cpp's GGML_CUDA_ALLREDUCE


@dataclass
class Measured:
    """Speeds of a group by name of the test: ours; theirs by split mode (and reduction)."""

    ours: dict[str, Speed] = field(default_factory=dict)
    theirs: dict[str, dict[str, Speed]] = field(default_factory=dict)

    def ratio(self, test: Test) -> float | None:
        ours, best = self.ours.get(test.name), self.best(test)
        if ours is None or best is None:
            return None
        return best / ours.median if test.kind == "first_token" else ours.median / best

    def best(self, test: Test) -> float | None:
        medians = [speed.median for speed in self.theirs.get(test.name, {}).values()]
        if not medians:
            return None
        return min(medians) if test.kind == "first_token" else max(medians)


def split_modes(options: argparse.Namespace, ranks: int) -> tuple[str, ...]:
    return ("none",) if ranks == 1 else options.split_modes


Attempt = Callable[[str, Callable[[], Any]], Any]


def measure_group(options: argparse.Namespace, group: Group, attempt: Attempt) -> tuple[Measured, dict[str, Any]]:
    """Ours, then theirs. Also what machine our side says that it ran on."""
    on_gpus = not (options.devices or options.cpu)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(group.ranks)))} if on_gpus else {}
    environment = {**os.environ, **visible}
    result, machine = Measured(), {}
    for tests in our_calls(group.tests):
        command = our_command(options, group, tests)
        report = attempt(
            f"multitensor, {group.name}", lambda c=command: json.loads(run(c, environment, options.timeout))
        )
        if report:
            result.ours |= our_speeds(report)
            machine = report["machine"]
    first = [test for test in group.tests if test.kind == "first_token"]
    for test in first:
        speed = attempt(
            f"multitensor, {group.name}, {test.name}", lambda t=test: our_first_token(options, group, t, environment)
        )
        result.ours |= {test.name: speed} if speed else {}
    for mode in split_modes(options, group.ranks) if options.llama_bench else ():
        for reduction in ("",) if group.p2p else ALL_REDUCES:
            label = f"{mode} {reduction}".strip()
            theirs = dict(environment)
            if reduction:
                theirs |= {"NCCL_P2P_DISABLE": "1", "GGML_CUDA_ALLREDUCE": reduction}
            for what, action in their_calls(options, group, mode, theirs):
                found = attempt(f"llama.cpp -sm {label}, {group.name}, {what}", action)
                for name, speed in (found or {}).items():
                    result.theirs.setdefault(name, {})[label] = speed
    return result, machine


def our_calls(tests: Sequence[Test]) -> list[list[Test]]:
    """Tests that one `bench` can do: prefills with the decodes of an empty cache, then depth by depth."""
    timed = [test for test in tests if test.kind != "first_token"]
    return [[t for t in timed if t.depth == depth] for depth in sorted({t.depth for t in timed})]


def their_calls(
    options: argparse.Namespace, group: Group, mode: str, environment: dict[str, str]
) -> list[tuple[str, Callable[[], dict[str, Speed]]]]:
    """(what it measures, what does it and returns speeds by name of the test) for each of their programs' runs."""

    def bench(tests: list[Test]) -> dict[str, Speed]:
        command = llama_bench_command(options, group, tests, mode)
        return llama_bench_speeds(run(command, environment, options.timeout))

    def batched(tests: list[Test]) -> dict[str, Speed]:
        command = batched_bench_command(options, group, tests, mode)
        return batched_bench_speeds(run(command, environment, options.timeout), options.repetitions)

    def first(test: Test) -> dict[str, Speed]:
        return {test.name: their_first_token(options, group, test, mode, environment)}

    calls: list[tuple[str, Callable[[], dict[str, Speed]]]] = []
    for tests in our_calls(group.tests):
        several = [t for t in tests if t.kind == "decode" and t.number > 1 and not t.depth]
        alone = [t for t in tests if t.kind == "prefill" or t.number == 1]
        if alone:
            calls.append((", ".join(t.name for t in alone), lambda t=alone: bench(t)))
        if several:
            calls.append((", ".join(t.name for t in several), lambda t=several: batched(t)))
    calls += [(t.name, lambda t=t: first(t)) for t in group.tests if t.kind == "first_token"]
    return calls


def groups_of(rows: Sequence[Row], folder: Path) -> list[Group]:
    """In the rows' order of first appearance, so that a file stays in the page cache while it is used."""
    tests: dict[tuple[str, int, str, bool], dict[Test, None]] = {}
    for row in rows:
        tests.setdefault((row.model, row.ranks, row.kv, row.p2p), {})[row.test] = None
    return [Group(model, folder / f"{model}.gguf", *rest, tuple(found)) for (model, *rest), found in tests.items()]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Side by side; a side that fails is reported, and the others go on."""
    errors: list[str] = []

    def attempt(what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            errors.append(f"{what}: {error}")
            print(errors[-1], file=sys.stderr, flush=True)
            return None

    found: dict[tuple[str, int, str, bool], Measured] = {}
    machine: dict[str, Any] = {}
    for group in options.groups:
        make_missing(group.path, group.model)
        result, ran_on = measure_group(options, group, attempt)
        found[group.model, group.ranks, group.kv, group.p2p] = result
        machine = ran_on or machine
    asked = options.wanted or [Row(group.model, test, group.ranks) for group in options.groups for test in group.tests]
    return {
        "models": {g.model: g.path.stat().st_size for g in options.groups if g.path.is_file()},
        "repetitions": options.repetitions,
        "generated_tokens": options.generate,
        "machine": {**hardware(), "multitensor": machine},
        "llama_cpp": build_info(options.llama_bench),
        "results": [result_of(row, found) for row in asked],
        "errors": errors,
    }


def result_of(row: Row, found: dict[tuple[str, int, str, bool], Measured]) -> dict[str, Any]:
    """A row with what was measured of it, and whether that is what was asked for (None: cannot be said)."""
    measured = found[row.model, row.ranks, row.kv, row.p2p]
    ours = measured.ours.get(row.test.name)
    single = found.get((row.model, 1, row.kv, row.p2p), Measured()).ours.get(row.test.name)
    figures = (ours.median if ours else None, measured.best(row.test), single.median if single else None)

    def judged(goal: Goal | None) -> dict[str, Any] | None:
        return None if goal is None else {"goal": str(goal), "met": goal.is_met(*figures)}

    return {
        "model": row.model,
        "test": row.test.name,
        "ranks": row.ranks,
        "kv": row.kv,
        "p2p": row.p2p,
        "ours": asdict(ours) if ours else None,
        "theirs": {mode: asdict(speed) for mode, speed in measured.theirs.get(row.test.name, {}).items()},
        "ratio": measured.ratio(row.test),
        "over_one_gpu": figures[0] / figures[2] if figures[0] and figures[2] and row.ranks > 1 else None,
        "required": judged(row.required),
        "aim": judged(row.aim),
    }


def make_missing(path: Path, model: str) -> None:
    """A synthetic model SHAPE-MIX, where there is none yet."""
    if path.is_file():
        return
    from synthetic_model import make

    shape, _, mix = model.rpartition("-")
    make(shape, mix, path, threads=os.cpu_count() or 4)


def hardware() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        gpus = []
    return {"system": platform.platform(), "cores": os.cpu_count(), "gpus": gpus}


def build_info(llama_bench: Path | None) -> str:
    """What build_llama_cpp.sh wrote beside the program."""
    if llama_bench is None:
        return "not run"
    path = llama_bench.with_name("build_info.txt")
    return path.read_text().strip() if path.is_file() else "built otherwise"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="a GGUF file")
    what.add_argument("--rows", choices=PRESETS, help="a table of peer_rows.py")
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="of the models of --rows")
    parser.add_argument("--only", default="", help="of --rows: models whose names contain this")
    parser.add_argument("--tests", default="decode:1,decode:4,prefill:512", help="of --model")
    parser.add_argument("--tp", default="1", help="of --model: numbers of GPUs, as 1,2")
    parser.add_argument("--generate", type=int, default=128, help="tokens to decode")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--split-modes", default="layer,tensor", help="llama.cpp's on several GPUs")
    parser.add_argument("--cpu", action="store_true", help="CPU ranks against llama.cpp on the CPU")
    parser.add_argument("--rehearse", action="store_true", help="--cpu, with tiny models and a shallow cache")
    parser.add_argument("--devices", help="of ours instead of --tp, as cpu:1")
    parser.add_argument("--ngl", type=int, default=999, help="llama.cpp's layers on the GPU")
    parser.add_argument("--threads", type=int, help="llama.cpp's CPU threads")
    parser.add_argument("--our-args", default="", help="more options of `multitensor bench` and `run`, by spaces")
    parser.add_argument("--llama-args", default="", help="more options of llama.cpp's programs, by spaces")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one command")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(given)
    options.our_args, options.llama_args = options.our_args.split(), options.llama_args.split()
    options.split_modes = tuple(options.split_modes.split(","))
    options.cpu = options.cpu or options.rehearse
    for path in filter(None, (options.model, options.llama_bench)):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    try:
        options.groups, options.wanted = chosen_groups(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def chosen_groups(options: argparse.Namespace) -> tuple[list[Group], list[Row]]:
    """(what is to be run, rows that were asked for: none with --model). Raises ValueError."""
    if options.rows is None:
        tests = tuple(parse_test(part) for part in filter(None, options.tests.split(",")))
        if not tests:
            raise ValueError("--tests: none given")
        counts = [int(part) for part in options.tp.split(",")]
        return [Group(options.model.stem, options.model, count, "", True, tests) for count in counts], []
    rows = [row for row in PRESETS[options.rows] if options.only in row.model]
    if options.rehearse:
        shallow = [replace(row.test, depth=row.test.depth // SHALLOW) for row in rows]
        names = [f"tiny-{row.model.rpartition('-')[2]}" for row in rows]
        rows = [replace(row, model=m, test=t) for row, m, t in zip(rows, names, shallow, strict=True)]
    return groups_of(rows, options.folder), rows


def main() -> int:
    options = arguments()
    report = measure(options)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
