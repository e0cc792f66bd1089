"""Logits of tiny random models against `transformers`, in float32, for each architecture and rope scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model_harness import logits_in_steps, random_prompts, relative_error
from synthetic import tiny_hf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "llama-one-kv-head": ("llama", {"hidden": 80, "n_heads": 5, "n_kv_heads": 1, "head_dim": 24}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE, "context": 128}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied-bias": ("qwen3", {"tied": True, "attention_bias": True}),
    "gemma3": ("gemma3", {"n_layers": 7, "sliding_window": 8, "head_dim": 32, "n_kv_heads": 1}),
    "gemma3-with-an-ignored-softcap": ("gemma3", {"attn_logit_softcapping": 0.05}),
    "gemma3-untied": ("gemma3", {"n_layers": 2, "sliding_window": 8, "tied": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    """Prefill in two chunks, a decode step between them, three prompts of unequal length, blocks in random order."""
    architecture, options = CASES[case]
    path = tiny_hf(tmp_path / case, architecture, **{"tied": architecture == "gemma3"} | options)
    prompts = random_prompts(320, [3, 61, 30])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = [oracle(torch.tensor([prompt])).logits[0] for prompt in prompts]
    for ratio in [(1.0,), (2.0, 1.0)]:
        for rank_logits in logits_in_steps(path, ratio, prompts, [17, 1, 20]):
            for found, expected in zip(rank_logits, wanted, strict=True):
                assert (found - expected).abs().max() < 1e-4, case
                assert relative_error(found, expected) < 1e-5


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    """The comparison above can fail: another seed's weights are far out of tolerance."""
    prompts = random_prompts(320, [9])
    first = logits_in_steps(tiny_hf(tmp_path / "a", seed=0), (1.0,), prompts, [])[0][0]
    second = logits_in_steps(tiny_hf(tmp_path / "b", seed=1), (1.0,), prompts, [])[0][0]
    assert relative_error(first, second) > 0.1
