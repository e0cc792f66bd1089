"""Attention of prompts without masks, each way by itself against float64, and through the engine."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from paged_case import Case
from test_long_prompts_gpu import SHAPE, TYPES, check_memory
from test_two_gpus import mean_kl, scores

from multitensor import LLM
from multitensor.kernels import prompt_attention
from multitensor.kernels.prompt_attention import PromptAttention, with_mask
from synthetic import write_gguf

pytestmark = pytest.mark.gpu

HALF, BFLOAT = torch.float16, torch.bfloat16
LIMIT = {HALF: 1.5e-3, BFLOAT: 1.2e-2}


@pytest.fixture(scope="module")
def ways() -> PromptAttention:
    return PromptAttention(torch.device("cuda:0"))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 128), (16, 2, 64), (3, 3, 128)])
def test_each_way(ways: PromptAttention, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> None:
    """Strides as the engine's: tokens first, some of the heads."""
    generator = torch.Generator("cuda").manual_seed(0)

    def numbers(length: int, count: int) -> torch.Tensor:
        every = torch.randn((length, count + 1, size), generator=generator, device="cuda").to(dtype)
        return every[:, 1:].transpose(0, 1).unsqueeze(0)

    for new, before in ((2, 700), (700, 0), (1024, 0), (1030, 1000), (1024, 1024), (3100, 1500)):
        q, k, v = numbers(new, heads), numbers(before + new, kv_heads), numbers(before + new, kv_heads)
        wanted = with_mask(q.double(), k.double(), v.double(), 0.1)
        for way in ways.ways:
            out = torch.full_like(q, float("nan"))
            ways.run(way, q, k, v, out, 0.1)
            error = ((out.double() - wanted).norm() / wanted.norm()).item()
            assert error < LIMIT[dtype], (way, new, before)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_the_first_way_is_believed_in(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is told, and mixed batches are right."""
    ways = PromptAttention(torch.device("cuda:0"))
    tolerance = 4e-3 if dtype == HALF else 3e-2
    monkeypatch.setattr(prompt_attention, "SMALLEST_BLOCK", 256)
    case = Case([700, 1, 300], [600, 40, 0], (0, 0, 1, 1), 2, 64, 16, cache_dtype=dtype, dtype=dtype, device="cuda")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*attention of prompts")
        case.check(tolerance=tolerance, prompts=ways)
        case.check(window=50, tolerance=tolerance, prompts=ways)
    q, k = (torch.zeros(1, heads, 256, 64, dtype=dtype, device="cuda") for heads in (4, 2))
    assert ways.way(q, k) == ways.ways[0] and ways.way(q[:, :, :9], k) == "flash"


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
@pytest.mark.parametrize("chunk", [2048, 8192])
def test_a_long_prompt(tmp_path: Path, kv_type: str, chunk: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", types=TYPES, context=1 << 15, **SHAPE)
    texts = [np.random.default_rng(1).integers(0, 512, 20_000).tolist()]
    found = []
    for dtype in ("float32", "float16"):  # with masks, and without
        options: dict[str, Any] = {"max_batch_tokens": chunk, "max_model_len": 20_480, "kv_type": kv_type}
        with LLM(path, devices="cuda:0", dtype=dtype, **options) as llm:
            found.append(scores(llm, texts))
            check_memory(llm)
            assert not any("attention of prompts" in warning for warning in llm.warnings)
    assert mean_kl(*found) <= 1e-3
