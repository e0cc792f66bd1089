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


def decoded(llm: LLM, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy texts with their prompts, and the log-probability of each chosen token as the decode step gave it."""
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)
    done = [output.outputs[0] for output in llm.generate(prompts, params)]
    texts = [prompt + list(out.token_ids) for prompt, out in zip(prompts, done, strict=True)]
    return texts, [
        [given[token].logprob for token, given in zip(out.token_ids, out.logprobs, strict=True)] for out in done
    ]


def scored(llm: LLM, texts: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of the same tokens as an eager prefill gives them."""
    return [[position.next_logprob for position in llm.score(ids, top=1)[-TOKENS - 1 : -1]] for ids in texts]


def mean_error(found: list[list[float]], wanted: list[list[float]]) -> float:
    pairs = [(f, w) for row, other in zip(found, wanted, strict=True) for f, w in zip(row, other, strict=True)]
    return sum(abs(f - w) for f, w in pairs) / len(pairs)


def check(path: Path, devices: str, dtype: str, *, verified: bool = True, **settings: Any) -> None:
    """Random weights magnify rounding (tenths of a nat in 16 bits), so the captured step is judged by float32 on a
    CPU: it may not be farther from it than the eager step is, but for chance."""
    found = {}
    with LLM(path, devices=devices, dtype=dtype, max_model_len=256, **settings) as llm:
        for name, prompts in (("three", PROMPTS), ("one", PROMPTS[:1]), ("nine, more than a graph takes", PROMPTS * 3)):
            texts, decode = decoded(llm, prompts)
            found[name] = texts, decode, scored(llm, texts)
        # q4 is judged by what real models tolerate, which random weights are not.
        assert not verified or llm.verify()["ok"]
    with LLM(path, devices="cpu:1", dtype="float32", max_model_len=256) as llm:
        for name, (texts, decode, eager) in found.items():
            truth = scored(llm, texts)
            assert mean_error(decode, truth) <= 1.5 * mean_error(eager, truth) + 1e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_quantised(tmp_path: Path, architecture: str, dtype: str) -> None:
    types = {"*attn_v*": "Q6_K", "*ffn_down*": "Q6_K", "token_embd*": "Q8_0", "*": "Q4_K"}
    check(write_gguf(tmp_path / "model.gguf", architecture, types=types, **DIMS), "cuda:0", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_type", ["q8", "q4"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_quantised_caches(tmp_path: Path, architecture: str, kv_type: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture, types="Q8_0", **DIMS)
    check(path, "cuda:0", "float16", verified=kv_type == "q8", kv_type=kv_type)


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
