"""The captured decode step against the eager one: `generate` decodes through CUDA graphs, `score` never does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from multitensor import LLM, SamplingParams
from synthetic import tiny_hf, write_gguf

DIMS = {"hidden": 256, "ffn": 768, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "vocab": 512}
PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38], [2, 71, 82, 81, 82], [16, 18, 3]]
TOKENS = 60  # the windowed model slides, blocks of 32 fill up


def largest_difference(llm: LLM, prompts: list[list[int]]) -> float:
    """Largest difference of log-probabilities of the chosen tokens, decoded and scored."""
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)
    worst = 0.0
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        done = output.outputs[0]
        scored = llm.score(prompt + list(done.token_ids), top=1)[len(prompt) - 1 : -1]
        for token, given, position in zip(done.token_ids, done.logprobs, scored, strict=True):
            worst = max(worst, abs(given[token].logprob - position.next_logprob))
    return worst


def check(path: Path, devices: str, dtype: str, **settings: Any) -> None:
    limit = 3e-2 if dtype == "float16" else 2e-1
    with LLM(path, devices=devices, dtype=dtype, max_model_len=256, **settings) as llm:
        assert largest_difference(llm, PROMPTS) < limit
        assert largest_difference(llm, PROMPTS[:1]) < limit
        assert largest_difference(llm, PROMPTS * 3) < limit  # nine sequences: more than a graph takes
        assert llm.verify()["ok"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_quantised(tmp_path: Path, architecture: str, dtype: str) -> None:
    types = {"*attn_v*": "Q6_K", "*ffn_down*": "Q6_K", "token_embd*": "Q8_0", "*": "Q4_K"}
    check(write_gguf(tmp_path / "model.gguf", architecture, types=types, **DIMS), "cuda:0", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "Q3_K", "IQ4_XS", "F16"])
def test_types(tmp_path: Path, kind: str) -> None:
    check(write_gguf(tmp_path / "model.gguf", types=kind, **DIMS), "cuda:0", "float16")


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_floats(tmp_path: Path, architecture: str) -> None:
    dims = {**DIMS, "dtype": "bfloat16"}
    check(tiny_hf(tmp_path / architecture, architecture, **dims), "cuda:0", "bfloat16")


@pytest.mark.gpu2
@pytest.mark.parametrize("ratio", [None, "3,1"])
def test_two_gpus(tmp_path: Path, ratio: str | None) -> None:
    path = write_gguf(tmp_path / "model.gguf", types="Q4_K", **{**DIMS, "n_heads": 8, "n_kv_heads": 4, "hidden": 512})
    check(path, "cuda:0,cuda:1", "float16", ratio=ratio)
