"""Prefill and decode on CPU ranks beside llama-cpp-python, on the same cores in one run, as ratios.

    python benchmarks/cpu_beside_llama_cpp.py --model smollm2.gguf --peer-python PEER/bin/python --json result.json

PEER is a virtual environment with llama-cpp-python built for this machine. The two sides take turns, `--rounds` times,
so that whatever else the machine does falls on both; the table shows medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

PEER = """
import json, sys, time
import llama_cpp
model, prompt, count, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
options = dict(n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
llm = llama_cpp.Llama(model, n_ctx=prompt + count + 16, **options)
ids = [(7 + 7919 * i) % llm.n_vocab() for i in range(prompt)]
best = {}
for turn in range(2):  # the first warms up
    llm.reset()
    start = time.perf_counter()
    llm.eval(ids)
    prefill = prompt / (time.perf_counter() - start)
    llm.reset()
    llm.eval(ids[:1])
    start = time.perf_counter()
    for i in range(count):
        llm.eval([ids[i % prompt]])
    best = {"prefill": prefill, "decode": count / (time.perf_counter() - start), "version": llama_cpp.__version__}
print(json.dumps(best))
"""


def ours(model: str, ranks: int, prompt: int, count: int) -> dict[str, float]:
    arguments = ["bench", model, "-p", str(prompt), "-n", str(count), "-r", "1", "--devices", f"cpu:{ranks}", "--json"]
    output = subprocess.run(
        [sys.executable, "-m", "multitensor", *arguments], check=True, capture_output=True, text=True
    )
    results = json.loads(output.stdout.splitlines()[-1])["results"]
    return {result["test"]: result["tokens_per_second"] for result in results}


def peer(python: str, model: str, prompt: int, count: int, threads: int) -> dict[str, float | str]:
    command = [python, "-c", PEER, model, str(prompt), str(count), str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    runs: dict[str, list[dict[str, float]]] = {"one rank": [], "two ranks": [], "llama.cpp": []}
    version = ""
    for _ in range(arguments.rounds):
        runs["one rank"].append(ours(arguments.model, 1, arguments.prompt, arguments.count))
        beside = peer(arguments.peer_python, arguments.model, arguments.prompt, arguments.count, cores)
        version = str(beside.pop("version"))
        runs["llama.cpp"].append({name: float(value) for name, value in beside.items()})
        runs["two ranks"].append(ours(arguments.model, 2, arguments.prompt, arguments.count))
    medians = {
        side: {test: statistics.median(run[test] for run in rows) for test in ("prefill", "decode")}
        for side, rows in runs.items()
    }
    report = {
        "machine": {"cores": cores, "system": platform.platform(), "llama_cpp_python": version},
        "model": Path(arguments.model).name,
        "tokens": {"prefill": arguments.prompt, "decode": arguments.count},
        "runs": runs,
        "medians": medians,
        "ratios": {
            side: {test: medians[side][test] / medians["llama.cpp"][test] for test in ("prefill", "decode")}
            for side in ("one rank", "two ranks")
        },
    }
    print(f"{'':10} {'prefill':>9} {'decode':>9}   tokens/s, medians of {arguments.rounds} on {cores} cores")
    for side, row in medians.items():
        ratio = report["ratios"].get(side)
        text = f"   {ratio['prefill']:.2f} x and {ratio['decode']:.2f} x llama.cpp" if ratio else ""
        print(f"{side:10} {row['prefill']:9.1f} {row['decode']:9.1f}{text}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
