"""Sequences of one new token beside prompts: decode.cu on an emulated GPU for them, the rest as ever, against dense
float64 attention."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import emulated_cuda
import numpy as np
import pytest
import torch
from paged_case import Case

from multitensor.kernels import attention
from multitensor.kernels.attention import paged_attention
from multitensor.kernels.cache_tensor import make_cache
from multitensor.kernels.cuda import decode, single_tokens
from multitensor.kernels.cuda.decode import DecodeKernels
from multitensor.kernels.cuda.single_tokens import SingleTokens

CPU = torch.device("cpu")
SCALE = 0.3


@pytest.fixture
def singles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SingleTokens:
    if emulated_cuda.compiler() is None:
        pytest.skip("there is no C++ compiler")
    emulated_cuda.replace_gpu(monkeypatch, emulated_cuda.AtOnce(tmp_path), decode, processors=2)
    return SingleTokens(DecodeKernels(CPU))


@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1, 5, 1, 1, 7, 1, 1], [40, 0, 0, 130, 20, 15, 16]),
        ([1, 1, 1], [3, 90, 31]),
        ([4, 1], [0, 0]),
    ],
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, 15.0)])
@pytest.mark.parametrize("kv_map", [(0, 0, 1), (1, 0, 1, 1)])
def test_beside_prompts(
    query_lens: list[int],
    context_lens: list[int],
    window: int | None,
    softcap: float | None,
    kv_map: tuple[int, ...],
    singles: SingleTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More than one launch takes, queries in a wider matrix; the plain way is not asked for them."""
    monkeypatch.setattr(single_tokens, "MAX_SEQUENCES", 4)
    monkeypatch.setattr(attention, "batches_decodes", lambda device: pytest.fail("the plain way was asked"))
    case = Case(query_lens, context_lens, kv_map, 2, 64, 16, cache_dtype=torch.float16, dtype=torch.float16)
    q = torch.cat([case.q, torch.full_like(case.q, float("nan"))], dim=1)[:, : len(kv_map)]
    caches = case.k_cache, case.v_cache
    assert singles.takes(q, *caches)
    own = partial(singles.attend, q, *caches, case.inputs, kv_map, scale=SCALE, window=window, softcap=softcap)
    found = paged_attention(q, *caches, case.inputs, kv_map, SCALE, window, softcap, singles=own)
    wanted = case.dense(SCALE, window, softcap)
    np.testing.assert_allclose(found.double().numpy(), wanted, atol=4e-3)


def test_what_it_does_not_take(singles: SingleTokens) -> None:
    def cache(kv_type: str, head_dim: int = 64, block_size: int = 16) -> object:
        return make_cache(kv_type, (2, block_size, 2, head_dim), CPU)

    def takes(dtype: torch.dtype, keys: object, values: object | None = None, head_dim: int = 64) -> bool:
        q = torch.zeros(3, 4, head_dim, dtype=dtype)
        return singles.takes(q, keys, keys if values is None else values)  # type: ignore[arg-type]

    half = torch.float16
    assert all(takes(half, cache(kind)) for kind in ("f16", "bf16", "f32", "q8", "q4"))
    assert not takes(torch.float32, cache("f32"))
    assert not takes(half, cache("f16", head_dim=72), head_dim=72)
    assert not takes(half, cache("q8", head_dim=80), head_dim=80)
    assert not takes(half, cache("f16", block_size=8))
    assert not takes(half, cache("f16"), cache("bf16"))
