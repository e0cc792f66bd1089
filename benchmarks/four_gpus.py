"""The whole list for four GPUs of one host, in under ten minutes: one JSON and one table.

    python benchmarks/four_gpus.py --folder /dev/shm --llama-bench llama/build/bin/llama-bench --json result.json

1. capped: the 70B in FP16 over all cards, all but --leave bytes of each held by another process (capped_gpus.py).
2. ratios: the same model, uncapped, at unequal shares and on three cards.
3. speed: 70B and 8B Q4_K_M on 1, 2 and 4 cards, beside llama.cpp `-sm tensor`; the 70B on all cards also without P2P.
4. killed: a rank gets SIGKILL while it decodes; how soon everything has ended, and what is left of it.

Models are synthetic, SHAPE-MIX.gguf in --folder, written there when missing. A part that fails is reported, and the
others go on. --tp 1,2 takes what two cards can show; --cpu rehearses with CPU ranks and tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import peer_llama_cpp
from capped_gpus import exercise, start_ballast, used_bytes
from peer_rows import Goal, Row, parse_test, table

RATIOS = ("2,1,1", "1,1,1", "3,3,2,2")
MEMORY_WITHIN = 0.03  # of the plan
SHARE_WITHIN = 0.02  # of all weights
SECONDS_TO_END = 5.0
LEFT_BYTES = 64 << 20  # of a card's memory, beside what was in use before
SCALING = 1.4  # of the largest number of cards over half of them, 70B decode


@dataclass(frozen=True)
class Check:
    """One line of the table. met: None where it cannot be said."""

    name: str
    found: str
    wanted: str
    met: bool | None


@dataclass(frozen=True)
class Scale:
    """What is run: the real thing, or the rehearsal."""

    float_model: str
    models: tuple[str, ...]
    prefill: int
    batch: int
    context: int
    tokens: int


REAL = Scale("llama3-70b-f16", ("llama3-70b-q4_k_m", "llama3-8b-q4_k_m"), 4096, 32, 2048, 32)
REHEARSAL = Scale("tiny-f16", ("tiny-q4_k_m",), 48, 4, 1280, 8)


# ---- capped and uncapped, equal and unequal ----


def shares(options: argparse.Namespace, ratio: str | None, ranks: int, leave: float | None) -> dict[str, Any]:
    """capped_gpus.exercise over so many cards, with ballast on them where `leave` says how much to leave."""
    scale = options.scale
    ballast: list[subprocess.Popen[str]] = []
    left: list[int] = []
    if leave is not None and not options.cpu:
        ballast, left = start_ballast(ranks, leave)
    try:
        path = model_path(options, scale.float_model)
        result = exercise(str(path), ranks, scale.context, scale.tokens, ratio, on_cpu=options.cpu)
    finally:
        for process in ballast:
            process.kill()
            process.wait()
    return {"ratio": ratio, "ranks": ranks, "left_free_bytes": left, **result}


def check_shares(name: str, result: dict[str, Any], cpu: bool) -> list[Check]:
    checks = [Check(f"{name}: verify", f"KL {result['verify']['kl_mean']:.1e}", "ok", bool(result["verify"]["ok"]))]
    resident, planned = result["resident_weight_bytes"], result["planned_weight_bytes"]
    if cpu:  # a process's memory says nothing to three percent
        exact = resident == planned
        checks.append(Check(f"{name}: weight bytes", "as planned" if exact else "not as planned", "the plan's", exact))
    else:
        worst = max(abs(part - 1.0) for part in result["used_over_planned"])
        wanted = f"within {MEMORY_WITHIN:.0%} of the plan"
        checks.append(Check(f"{name}: memory a card", f"off by {worst:.1%}", wanted, worst <= MEMORY_WITHIN))
    parts = [float(part) for part in (result["ratio"] or ",".join("1" * result["ranks"])).split(",")]
    off = max(abs(r / sum(resident) - p / sum(parts)) for r, p in zip(resident, parts, strict=True))
    # Replicated and indivisible tensors of a tiny model move its shares further than a real one's.
    wanted = "told only" if cpu else f"within {SHARE_WITHIN:.0%} of the weights"
    checks.append(Check(f"{name}: balance", f"off by {off:.1%}", wanted, None if cpu else off <= SHARE_WITHIN))
    loaded = f"{result['load_seconds']:.1f} s"
    speeds = ", ".join(f"{batch}: {speed:.1f}" for batch, speed in result["tokens_per_second"].items())
    prefill = result["prefill_1024_tokens_per_second"]
    checks.append(Check(f"{name}: load; tok/s", f"{loaded}; {speeds}; prefill 1024: {prefill:.0f}", "told only", None))
    return checks


# ---- speed ----


def speed_rows(options: argparse.Namespace) -> list[Row]:
    """At least twice llama.cpp on all cards, with and without P2P; the others are told."""
    scale, most = options.scale, max(options.tp)
    rows = []
    for model in scale.models:
        for ranks in options.tp:
            for test in ("decode:1", f"prefill:{scale.prefill}", f"decode:{scale.batch}"):
                goal = Goal(2.0, "x") if ranks == most and ranks > 1 else None
                rows.append(Row(model, parse_test(test), ranks, goal))
    if most > 1 and not options.cpu:
        rows += [replace(row, p2p=False) for row in rows if row.ranks == most and row.model == scale.models[0]]
    return rows


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    rows = speed_rows(options)
    given = ["--rows", "issue3", "--llama-bench", str(options.llama_bench or __file__), "--split-modes", "tensor"]
    given += ["--repetitions", str(options.repetitions), "--generate", str(options.generate), "--timeout", "240"]
    peer = peer_llama_cpp.arguments(given + (["--cpu"] if options.cpu else []))
    peer.llama_bench = options.llama_bench
    peer.wanted, peer.groups = rows, peer_llama_cpp.groups_of(rows, options.folder)
    return peer_llama_cpp.measure(peer)


def check_scaling(options: argparse.Namespace, report: dict[str, Any]) -> list[Check]:
    """The largest number of cards over half of it, where both were measured."""
    most = max(options.tp)
    found = {
        (row["model"], row["ranks"]): row["ours"]["median"]
        for row in report["results"]
        if row["test"] == "decode:1" and row["p2p"] and row["ours"]
    }
    checks = []
    for number, model in enumerate(options.scale.models):
        if (model, most) in found and (model, most // 2) in found:
            ratio = found[model, most] / found[model, most // 2]
            asked = number == 0 and most == 4 and not options.cpu
            wanted, met = (f"at least {SCALING}", ratio >= SCALING) if asked else ("told only", None)
            checks.append(Check(f"{model} decode: {most} ranks over {most // 2}", f"{ratio:.2f}", wanted, met))
    return checks


# ---- a rank that dies ----


def kill_a_rank(options: argparse.Namespace) -> dict[str, Any]:
    """Ends the last rank with SIGKILL in the middle of a decode. seconds: until the call has failed, no process of a
    rank is left, and no card holds more memory than before."""
    from multitensor import LLM, RankFailed, SamplingParams

    ranks = max(options.tp)
    path = str(model_path(options, options.scale.models[0]))
    where: dict[str, Any] = {"devices": f"cpu:{ranks}"} if options.cpu else {"tensor_parallel_size": ranks}
    before = [] if options.cpu else used_bytes(ranks)
    killed: list[float] = []
    message = ""
    with LLM(path, max_model_len=1024, **where) as llm:
        workers = rank_processes()
        stream = llm.stream([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True))
        for _ in range(16):
            next(stream)

        def kill() -> None:
            killed.append(time.perf_counter())
            os.kill(workers[-1], signal.SIGKILL)

        timer = threading.Timer(0.05, kill)
        timer.start()
        try:
            for _ in stream:
                pass
        except RankFailed as error:
            message = str(error)
        timer.join()
    while time.perf_counter() - killed[0] < 4 * SECONDS_TO_END:
        alive = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        now = [] if options.cpu else used_bytes(ranks)
        left = max((after - start for after, start in zip(now, before, strict=True)), default=0)
        if not alive and left <= LEFT_BYTES:
            break
        time.sleep(0.02)
    seconds = time.perf_counter() - killed[0]
    return {"message": message, "seconds": seconds, "processes_left": len(alive), "bytes_left": left, "ranks": ranks}


def rank_processes() -> list[int]:
    """This process's ranks, in rank order."""
    import psutil

    found = {}
    for child in psutil.Process().children(recursive=True):
        command = child.cmdline()
        if "multitensor.engine.worker" in command:
            found[int(command[command.index("multitensor.engine.worker") + 1])] = child.pid
    return [found[rank] for rank in sorted(found)]


def check_killed(result: dict[str, Any]) -> list[Check]:
    clean = bool(result["message"]) and not result["processes_left"] and result["bytes_left"] <= LEFT_BYTES
    found = f"{result['seconds']:.2f} s; {result['processes_left']} processes, {result['bytes_left'] >> 20} MiB left"
    wanted = f"within {SECONDS_TO_END:.0f} s, nothing left"
    return [Check("a rank killed while decoding", found, wanted, clean and result["seconds"] <= SECONDS_TO_END)]


# ---- all of it ----


def model_path(options: argparse.Namespace, model: str) -> Path:
    path = options.folder / f"{model}.gguf"
    peer_llama_cpp.make_missing(path, model)
    return path


def ratios_for(options: argparse.Namespace) -> list[str]:
    possible = [ratio for ratio in options.ratios if ratio.count(",") + 1 <= max(options.tp)]
    return possible or (["2,1"] if max(options.tp) == 2 else [])


def everything(options: argparse.Namespace) -> dict[str, Any]:
    checks: list[Check] = []
    report: dict[str, Any] = {"errors": [], "seconds": {}}

    def part(name: str, action: Callable[[], Any], check: Callable[[Any], list[Check]]) -> None:
        if name.split()[0] not in options.parts:
            return
        print(f"== {name}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            report[name] = action()
            checks.extend(check(report[name]))
        except Exception as error:  # whatever it is, the parts after it are still to be shown
            report["errors"].append(f"{name}: {type(error).__name__}: {error}")
            checks.append(Check(name, str(error)[:200], "no failure", False))
        report["seconds"][name] = time.perf_counter() - started

    most = max(options.tp)
    part(
        "capped",
        lambda: shares(options, None, most, options.leave),
        lambda result: check_shares(f"{options.scale.float_model} capped, {most} cards", result, options.cpu),
    )
    for ratio in ratios_for(options):
        part(
            f"ratios {ratio}",
            lambda r=ratio: shares(options, r, r.count(",") + 1, None),
            lambda result, r=ratio: check_shares(f"{options.scale.float_model} at {r}", result, options.cpu),
        )
    part("speed", lambda: measure_speed(options), lambda result: check_scaling(options, result))
    part("killed", lambda: kill_a_rank(options), check_killed)
    report["errors"] += report.get("speed", {}).get("errors", [])
    report["checks"] = [vars(check) for check in checks]
    return report


def tables(report: dict[str, Any]) -> str:
    verdicts = {True: "met", False: "missed", None: ""}
    lines = ["| what | found | wanted | |", "|---|---|---|---|"]
    lines += [f"| {c['name']} | {c['found']} | {c['wanted']} | {verdicts[c['met']]} |" for c in report["checks"]]
    if "speed" in report:
        lines += ["", table(report["speed"])]
    seconds = ", ".join(f"{name} {taken:.0f} s" for name, taken in report["seconds"].items())
    return "\n".join([*lines, "", f"{seconds}; {sum(report['seconds'].values()):.0f} s in all", *report["errors"]])


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", default="1,2,4", help="numbers of cards")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="of the models")
    parser.add_argument("--llama-bench", type=Path, help="without it our side alone is measured")
    parser.add_argument("--leave", type=float, default=40e9, help="bytes left free on each card for `capped`")
    parser.add_argument("--ratios", default=";".join(RATIOS), help="separated by semicolons")
    parser.add_argument("--parts", default="capped,ratios,speed,killed")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--generate", type=int, default=64, help="tokens to decode")
    parser.add_argument("--cpu", action="store_true", help="rehearse with CPU ranks and tiny models")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(given)
    options.tp = tuple(sorted(int(part) for part in options.tp.split(",")))
    options.ratios = tuple(part for part in options.ratios.split(";") if part)
    options.parts = tuple(options.parts.split(","))
    options.scale = REHEARSAL if options.cpu else REAL
    if options.llama_bench and not options.llama_bench.is_file():
        parser.error(f"{options.llama_bench}: no such file")
    return options


def main() -> int:
    options = arguments()
    report = everything(options)
    print(tables(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["errors"] or any(check["met"] is False for check in report["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
