"""Prompts' products in 8 bits: by themselves against float64, and what the real models lose by them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_real_models import GOLDENS, MODELS, PERPLEXITY

from conftest import find_model
from multitensor import LLM
from multitensor.config import INT8_PROMPTS
from multitensor.kernels.cuda.int8 import Int8Products

pytestmark = pytest.mark.gpu


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "columns", "rows"), [(256, 576, 1600), (1000, 4096, 6144), (2048, 2048, 2064)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products(dtype: torch.dtype, tokens: int, columns: int, rows: int, has_bias: bool) -> None:
    """Weights at once and some rows at a time; activations with columns 30 times the others."""
    x, w = randn(tokens, columns, dtype=dtype, seed=0), randn(rows, columns, dtype=dtype, seed=1)
    x[:, 5::500] *= 30
    bias = randn(rows, dtype=torch.float32, seed=2) if has_bias else None
    wanted = x.double() @ w.double().T + (0 if bias is None else bias)
    ours = Int8Products(x.device, 256 << 20)
    assert ours.takes(x, [rows])
    found = [ours.multiply(x, iter(w.split(few)), bias, rows) for few in (rows, 1024, 16 * (rows // 48))]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert found[0].dtype == dtype and not found[0].isnan().any()
    assert ((found[0].double() - wanted).norm() / wanted.norm()).item() < 0.02


def test_rows_of_integers() -> None:
    x = randn(300, 4160, dtype=torch.bfloat16, seed=3)[:, :4096]
    x[7] = 0.0
    x[9, 4000] = float("nan")
    integers, scales = Int8Products(x.device, 256 << 20).quantise(x)
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cuda")
    for _ in range(6):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    turned = (x.double().unflatten(1, (-1, 64)) @ matrix / 8).flatten(1)
    steps = scales.double().unsqueeze(1)
    sound = torch.arange(300, device="cuda") != 9
    assert torch.all(((integers.double() * steps - turned).abs() <= 0.5001 * steps + 1e-30)[sound])
    assert scales[7] == 0 and scales[9].isnan()


@pytest.mark.models
@pytest.mark.parametrize("name", MODELS)
def test_a_real_model(name: str) -> None:
    """Over the golden texts that are long enough."""
    golden = json.loads((GOLDENS / f"{MODELS[name]}.json").read_text())["exact"]
    texts = [text["ids"] for text in golden["texts"] if len(text["ids"]) >= 256]
    found = []
    for names in ((), (INT8_PROMPTS,)):
        with LLM(find_model(name), devices="cuda:0", dtype="float16", max_model_len=1024, experimental=names) as llm:
            scores = [score.next_logprob for ids in texts for score in llm.score(ids)]
            assert llm.verify()["ok"]
        following = [score for score in scores if score is not None]
        found.append(math.exp(-sum(following) / len(following)))
    print(f"\n{name}: perplexity {found[0]:.4f}, in 8 bits {found[1]:.4f}, {found[1] / found[0] - 1:+.2%}")
    assert found[0] != found[1]  # it was done
    assert found[1] / found[0] - 1 <= 2 * PERPLEXITY  # of so few positions, of which one model loses 0.3% in all
