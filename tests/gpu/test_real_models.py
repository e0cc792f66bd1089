"""The real models on one GPU, against what llama.cpp says of float32 copies of their weights: perplexity, greedy texts
(which the decode kernels write), and the start-up check."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from conftest import find_model
from multitensor import LLM, SamplingParams

GOLDENS = Path(__file__).parents[1] / "goldens"
MODELS = {"smollm2-135m": "smollm2-135m-q4_1", "gemma3-270m": "gemma3-270m-q4_k_m"}
PERPLEXITY = 0.005
# The least that llama.cpp preferred a token by, in nats, for rounding to 16 bits not to decide.
MARGINS = {"float32": 0.1, "float16": 0.1, "bfloat16": 0.5}


@pytest.mark.gpu
@pytest.mark.models
@pytest.mark.parametrize("dtype", MARGINS)
@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_on_one_gpu(name: str, dtype: str) -> None:
    golden = json.loads((GOLDENS / f"{MODELS[name]}.json").read_text())["exact"]
    entries = golden["continuations"]
    params = SamplingParams(temperature=0.0, max_tokens=len(entries[0]["tokens"]), ignore_eos=True)
    with LLM(find_model(name), devices="cuda:0", dtype=dtype, max_model_len=1024) as llm:
        scores = [score.next_logprob for text in golden["texts"] for score in llm.score(text["ids"])]
        written = [llm.generate([entry["ids"]], params)[0].outputs[0].token_ids for entry in entries]
        together = [output.outputs[0].token_ids for output in llm.generate([entry["ids"] for entry in entries], params)]
        report = llm.verify()
    following = [score for score in scores if score is not None]
    ratio = math.exp(-sum(following) / len(following)) / golden["perplexity"]
    compared = 0
    for entry, alone, beside in zip(entries, written, together, strict=True):
        margins = entry["margins"]
        sure = next((i for i, margin in enumerate(margins) if margin < MARGINS[dtype]), len(margins))
        assert alone[:sure] == entry["tokens"][:sure], entry["prompt"]
        assert beside[:sure] == entry["tokens"][:sure], entry["prompt"]
        compared += sure
    print(
        f"\n{name} {dtype}: perplexity / llama.cpp's {ratio:.5f}, {compared} sure tokens equal, verify {report['ok']}"
    )
    assert report["ok"], report
    assert abs(ratio - 1) <= PERPLEXITY
    assert compared > 0
