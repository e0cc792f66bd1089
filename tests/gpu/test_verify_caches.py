"""`verify` on one GPU over every type of cache: the engine's kernels against plain torch that reads what they wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from multitensor import LLM
from synthetic import write_gguf

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kv_type", ["f16", "bf16", "q8", "q4"])
def test_layers_and_caches_are_within_tolerance(dtype: str, kv_type: str, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", hidden=256, ffn=512, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=64, types="Q8_0"
    )
    with LLM(path, devices="cuda:0", dtype=dtype, kv_type=kv_type, max_model_len=256) as llm:
        report = llm.verify()
    for entry in report["layers"]:
        assert entry["error"] < report["tolerance"]
        assert entry["run_error"] < report["run_tolerance"]
        assert entry["cache_error"] < report["cache_tolerance"]
