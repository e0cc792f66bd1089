"""On real GPUs: kernels against the CPU, two cards against one, the real models against their goldens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from conftest import find_model
from multitensor import LLM, SamplingParams
from synthetic import tiny_hf, write_gguf

GOLDENS = Path(__file__).parents[1] / "goldens"
MODELS = {"smollm2-135m": "smollm2-135m-q4_1", "gemma3-270m": "gemma3-270m-q4_k_m"}
PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79], [2, 71, 82, 81], [16, 18, 3]]


def renormalised_kl(wanted: dict[int, float], found: dict[int, float]) -> float:
    """KL divergence of two top lists over the ids that both hold, each renormalised, in nats."""
    common = [token for token in wanted if token in found]
    p_sum = sum(math.exp(wanted[token]) for token in common)
    q_sum = sum(math.exp(found[token]) for token in common)
    return sum(
        math.exp(wanted[t]) / p_sum * ((wanted[t] - math.log(p_sum)) - (found[t] - math.log(q_sum))) for t in common
    )


def scores(llm: LLM, texts: list[list[int]]) -> list[dict[int, float]]:
    """Top 20 of every position of every text."""
    positions = [position for ids in texts for position in llm.score(ids, top=20)]
    return [dict(zip(p.top_ids, p.top_logprobs, strict=True)) for p in positions]


def mean_kl(wanted: list[dict[int, float]], found: list[dict[int, float]]) -> float:
    return sum(map(renormalised_kl, wanted, found)) / len(wanted)


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / f"{MODELS[name]}.json").read_text())


@pytest.mark.gpu2
@pytest.mark.models
@pytest.mark.parametrize("name", MODELS)
def test_two_gpus_match_the_whole_model_and_the_goldens(name: str, record_property: Any) -> None:
    """float16 and bfloat16 over two cards: against float32 on a CPU rank, and against one card."""
    path = find_model(name)
    texts = [text["ids"] for text in golden(name)["exact"]["texts"]]
    with LLM(path, devices="cpu:1", dtype="float32", max_model_len=1024) as llm:
        reference = scores(llm, texts)
    for dtype in ("float32", "float16", "bfloat16"):
        with LLM(path, devices="cuda:0", dtype=dtype, max_model_len=1024) as llm:
            one = scores(llm, texts)
        with LLM(path, devices="cuda:0,cuda:1", dtype=dtype, max_model_len=1024) as llm:
            two = scores(llm, texts)
            assert llm.verify()["ok"]
        report = {"one | float32": mean_kl(reference, one), "two | float32": mean_kl(reference, two)}
        report["two | one"] = mean_kl(one, two)
        print(f"\n{name} {dtype}: " + ", ".join(f"KL {key} {value:.2e}" for key, value in report.items()))
        record_property(f"{name} {dtype}", report)
        assert report["two | one"] <= 1e-3, report
        assert report["two | float32"] <= (1e-2 if dtype == "bfloat16" else 1e-3), report


@pytest.mark.gpu2
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("ratio", [None, "3,1"])
def test_tiny_models_on_two_gpus(tmp_path: Path, architecture: str, ratio: str | None) -> None:
    path = tiny_hf(tmp_path / architecture, architecture)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    ids = [[token % 64 for token in prompt] for prompt in PROMPTS]
    with LLM(path, devices="cpu:1", dtype="float32", max_model_len=128) as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(ids, params)]
        wanted_scores = scores(llm, ids)
    with LLM(path, devices="cuda:0,cuda:1", dtype="float32", max_model_len=128, ratio=ratio) as llm:
        found = [output.outputs[0].token_ids for output in llm.generate(ids, params)]
        assert mean_kl(wanted_scores, scores(llm, ids)) <= 1e-5
        assert llm.verify()["ok"]
    assert found == wanted


@pytest.mark.gpu2
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_an_ffn_of_768_is_cut_in_the_middle_of_a_super_block(tmp_path: Path, kind: str) -> None:
    path = write_gguf(
        tmp_path / "model.gguf",
        hidden=256,
        ffn=768,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        vocab=512,
        types=kind,
    )
    with LLM(path, devices="cuda:0,cuda:1", dtype="float32", max_model_len=256) as llm:
        assert [rank.ffn for rank in llm.plan.ranks] == [(0, 384), (384, 768)]
        report = llm.verify()
    assert report["ok"], report


@pytest.mark.gpu
def test_a_cap_is_kept(tmp_path: Path) -> None:
    """A capped device plans within its cap, and the process stays under it."""
    path = write_gguf(
        tmp_path / "model.gguf",
        hidden=256,
        ffn=768,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        vocab=512,
        types="F16",
    )
    with LLM(path, devices="cuda:0=2GiB", max_model_len=256) as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=8))
        assert llm.memory()[0]["reserved_bytes"] <= 2 << 30
        assert sum(llm.memory_plan[0].weights.values()) == llm.memory()[0]["weights_bytes"]
