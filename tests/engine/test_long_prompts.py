"""A prompt of 100,000 tokens through rank processes: in long steps and in short ones, within the memory of the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

from multitensor import LLM, SamplingParams
from synthetic import write_gguf

TOKENS = 100_000


def peaks_of_ranks() -> list[int]:
    """The most bytes that each child process has ever had in memory."""
    found = []
    for child in psutil.Process().children(recursive=True):
        status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    return found


@pytest.mark.processes
def test_a_prompt_of_100000_tokens(tmp_path: Path) -> None:
    """A window of 512, so that a CPU is through in seconds; over all keys, kernels/test_attention_memory.py looks."""
    shape = {"hidden": 64, "ffn": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 32}
    path = write_gguf(tmp_path / "m.gguf", "gemma3", types="Q8_0", sliding_window=512, context=1 << 17, **shape)
    prompt = np.random.default_rng(0).integers(0, 320, TOKENS).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    texts = []
    for chunk in (None, 8192):
        before = len(peaks_of_ranks())
        with LLM(path, devices="cpu:2", max_model_len=TOKENS + 8, max_batch_tokens=chunk) as llm:
            texts.append(llm.generate([prompt], params)[0].outputs[0].token_ids)
            assert all(
                peak < planned.total for peak, planned in zip(peaks_of_ranks()[before:], llm.memory_plan, strict=True)
            )
            assert [planned.kv for planned in llm.memory_plan] == [memory["kv_bytes"] for memory in llm.memory()]
            assert llm.plan.max_batch_tokens == (chunk or 512)
    assert texts[0] == texts[1] and len(texts[0]) == 8
