"""What a grammar costs a token: a batch of sequences free, under an open regex, and under a JSON schema, taking turns.

    python benchmarks/grammar_overhead.py --model smollm2-135m-q4_1.gguf --devices cpu:2 --json result.json

Every variant has the same prompts and the same number of tokens. The open regex allows every text, so its texts must be
those of the free variant, which is checked; the schema describes a list too long to be finished. Seconds are those of a
whole call, medians over rounds in which the variants take turns; the overhead is the median of the rounds' own ratios,
so that a machine that is slower for a while does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from multitensor import LLM, SamplingParams
from multitensor.engine.request import StructuredOutputsParams

TOPICS = ("a town", "a ship", "a cook", "a river", "a horse", "a school", "a garden", "a storm")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["Paris", "London", "Rome", "Madrid"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "city", "tags"],
    "additionalProperties": False,
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "free": None,
    "regex": {"regex": "(?s:.*)"},
    "schema": {"json": {"type": "array", "items": PERSON, "minItems": 200}, "disable_any_whitespace": True},
}


def params_of(variant: str, tokens: int) -> SamplingParams:
    options = VARIANTS[variant]
    structured = None if options is None else StructuredOutputsParams(**options)
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, structured_outputs=structured)


def measure(llm: LLM, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """{"milliseconds": variant -> a token of one sequence, "overhead": variant -> share, ...}."""
    prompts = [f"Write about {TOPICS[number % len(TOPICS)]}, number {number}:" for number in range(batch)]
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(rounds + 1):  # the first warms up
        texts: dict[str, list[str]] = {}
        for variant in sorted(VARIANTS, reverse=bool(number % 2)):
            started = time.perf_counter()
            outputs = llm.generate(prompts, params_of(variant, tokens))
            elapsed = time.perf_counter() - started
            if any(len(output.outputs[0].token_ids) != tokens for output in outputs):
                raise SystemExit(f"{variant}: a text ended early, so its time is not comparable")
            texts[variant] = [output.outputs[0].text for output in outputs]
            if number:
                seconds[variant].append(elapsed)
        if texts["regex"] != texts["free"]:
            raise SystemExit("a regex that allows everything changed a text")
    ratios = {
        variant: [mine / free for mine, free in zip(seconds[variant], seconds["free"], strict=True)]
        for variant in VARIANTS
    }
    return {
        "batch": batch,
        "tokens": tokens,
        "rounds": rounds,
        "milliseconds": {name: 1e3 * statistics.median(values) / tokens for name, values in seconds.items()},
        "least_milliseconds": {name: 1e3 * min(values) / tokens for name, values in seconds.items()},
        "overhead": {name: statistics.median(values) - 1 for name, values in ratios.items()},
        "spread": {name: [min(values) - 1, max(values) - 1] for name, values in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with LLM(arguments.model, devices=arguments.devices, max_model_len=512) as llm:
        found = measure(llm, arguments.batch, arguments.tokens, arguments.rounds)
    found |= {"model": Path(arguments.model).name, "devices": arguments.devices}
    print(f"{found['model']} on {arguments.devices}, batch {arguments.batch}, {arguments.rounds} rounds")
    for name in VARIANTS:
        low, high = found["spread"][name]
        step, least = found["milliseconds"][name], found["least_milliseconds"][name]
        print(
            f"  {name:7} {step:7.2f} ms a step ({least:.2f} at best)   "
            f"overhead {found['overhead'][name]:+6.1%} ({low:+.1%} to {high:+.1%})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
