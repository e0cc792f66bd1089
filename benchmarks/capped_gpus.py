"""A model larger than one card: FP16 weights over several GPUs, each with all but so many GB held by another process.

    python benchmarks/capped_gpus.py --model /dev/shm/70b-f16.gguf --leave 80e9 --tp 2 --json result.json

Another process holds the rest of each card with plain allocations, so the limit is real and not a setting of the
allocator under test. Then the engine loads, generates greedily, and `verify` compares it with the whole model streamed
a layer at a time; the greedy ids are compared with the whole model's own choices, position by position; and the memory
a card uses, as the driver counts it, is compared with the plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BALLAST = """
import sys, torch
device, leave = int(sys.argv[1]), float(sys.argv[2])
torch.cuda.set_device(device)
torch.zeros(1, device="cuda")
held = []
while (free := torch.cuda.mem_get_info(device)[0]) > leave + (32 << 20):
    held.append(torch.full((int(min(free - leave, 8 << 30)),), 1, dtype=torch.uint8, device="cuda"))
torch.cuda.synchronize()
print(torch.cuda.mem_get_info(device)[0], flush=True)
sys.stdin.read()
"""


def used_bytes(count: int) -> list[int]:
    import pynvml

    pynvml.nvmlInit()
    return [int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(i)).used) for i in range(count)]


def start_ballast(count: int, leave: float) -> tuple[list[subprocess.Popen[str]], list[int]]:
    """One process a card; returns them and the bytes each card has left."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BALLAST, str(i), str(leave)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    return processes, [int(p.stdout.readline()) for p in processes if p.stdout]


def exercise(
    model: str, tp: int, context: int, tokens: int, ratio: str | None, *, on_cpu: bool = False
) -> dict[str, Any]:
    """Loads, generates, measures and verifies. on_cpu: over CPU ranks, whose memory in use is that of the processes."""
    from multitensor import LLM, SamplingParams

    where: dict[str, Any] = {"devices": f"cpu:{tp}"} if on_cpu else {"tensor_parallel_size": tp, "dtype": "float16"}
    before = [0] * tp if on_cpu else used_bytes(tp)
    started = time.perf_counter()
    with LLM(model, max_model_len=context, ratio=ratio, **where) as llm:
        loaded = time.perf_counter() - started
        vocabulary = llm.plan.spec.vocab_size
        prompts = [[(7 + 7919 * i + 31 * p) % vocabulary for i in range(64 + 16 * p)] for p in range(3)]
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        llm.generate(prompts[0], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        timed = {}
        for batch in (1, 3):
            started = time.perf_counter()
            outputs = llm.generate(prompts[:batch], params)
            timed[f"batch {batch}"] = batch * tokens / (time.perf_counter() - started)
        started = time.perf_counter()
        llm.generate([[(11 + 104729 * i) % vocabulary for i in range(1024)]], SamplingParams(max_tokens=1))
        prefill = 1024 / (time.perf_counter() - started)
        resident = llm.memory()
        after = [entry["rss_bytes"] for entry in resident] if on_cpu else used_bytes(tp)
        used = [now - start for now, start in zip(after, before, strict=True)]
        planned = [entry.total for entry in llm.memory_plan]
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        started = time.perf_counter()
        report = llm.verify([prompt + out for prompt, out in zip(prompts, ids, strict=True)])
        verified = time.perf_counter() - started
        weights = [sum(entry.weights.values()) for entry in llm.memory_plan]
    agree = [
        [a == b for a, b in zip(whole[len(prompt) - 1 :], out, strict=False)]
        for whole, prompt, out in zip(report["whole_top1"], prompts, ids, strict=True)
    ]
    return {
        "load_seconds": loaded,
        "tokens_per_second": timed,
        "prefill_1024_tokens_per_second": prefill,
        "used_bytes": used,
        "planned_bytes": planned,
        "used_over_planned": [u / p for u, p in zip(used, planned, strict=True)],
        "resident_weight_bytes": [entry["weights_bytes"] for entry in resident],
        "planned_weight_bytes": weights,
        "verify": {k: report[k] for k in ("ok", "kl_mean", "kl_max", "top1_agreement", "tolerance")},
        "worst_layer_error": max(layer["error"] for layer in report["layers"]),
        "verify_seconds": verified,
        "ids_equal_to_streamed_whole_model": [sum(row) for row in agree],
        "ids_compared": [len(row) for row in agree],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--leave", type=float, default=80e9, help="bytes left free on each card")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ratio")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ballast, left = start_ballast(arguments.tp, arguments.leave)
    print("left free on each card:", left, flush=True)
    try:
        result = exercise(arguments.model, arguments.tp, arguments.ctx, arguments.tokens, arguments.ratio)
    finally:
        for process in ballast:
            process.kill()
    result["left_free_bytes"] = left
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
