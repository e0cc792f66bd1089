"""Long prompts on GPUs: in long steps and in short ones, within the memory of the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_two_gpus import mean_kl, scores

from multitensor import LLM, SamplingParams
from synthetic import write_gguf

SHAPE = {"hidden": 512, "ffn": 1536, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "vocab": 512}
TYPES = {"*attn_v*": "Q6_K", "*ffn_down*": "Q6_K", "*": "Q4_K"}


def check_memory(llm: LLM) -> None:
    for planned, held in zip(llm.memory_plan, llm.memory(), strict=True):
        outside = sum(planned.buffer_parts[name] for name in ("cuda_context", "nccl", "peer_memory"))
        assert held["reserved_bytes"] <= planned.total - outside
        assert held["kv_bytes"] == planned.kv


@pytest.mark.gpu
@pytest.mark.parametrize("kv_type", ["f16", "q8"])
def test_longer_steps_say_the_same(tmp_path: Path, kv_type: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", types=TYPES, context=1 << 15, **SHAPE)
    texts = [np.random.default_rng(1).integers(0, 512, 20_000).tolist()]
    found = []
    for chunk in (None, 8192, 20_480):
        options: dict[str, Any] = {"max_model_len": 20_480, "dtype": "float16", "kv_type": kv_type}
        with LLM(path, devices="cuda:0", max_batch_tokens=chunk, **options) as llm:
            found.append(scores(llm, texts))
            check_memory(llm)
    assert max(mean_kl(found[0], other) for other in found[1:]) <= 1e-3


@pytest.mark.gpu2
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kv_type", ["bf16", "q4"])
def test_a_prompt_of_100000_tokens(tmp_path: Path, kv_type: str, overlap: bool) -> None:
    path = write_gguf(tmp_path / "m.gguf", types=TYPES, context=1 << 17, **SHAPE)
    prompt = np.random.default_rng(0).integers(0, 512, 100_000).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM(
        path, devices="cuda:0,cuda:1", max_model_len=100_032, kv_type=kv_type, max_batch_tokens=4096, overlap=overlap
    ) as llm:
        (output,) = llm.generate([prompt], params)
        assert len(output.outputs[0].token_ids) == 8
        check_memory(llm)
