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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from peer_rows import PRESETS, Goal, Row, Test, parse_test, table

SHALLOW = 64  # a rehearsal's cache is so many times less deep
ALL_REDUCES = ("nccl", "internal")  # llama.cpp's GGML_CUDA_ALLREDUCE


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


def split_modes(options: argparse.Namespace, ranks: int) -> tuple[str, ...]:
    return ("none",) if ranks == 1 else options.split_modes


# ---- both ----

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
