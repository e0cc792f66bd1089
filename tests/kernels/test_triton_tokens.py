"""Triton's attention, norms and rotation against dense float64 attention and plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paged_case import Case
from triton_here import DEVICE, MARKS, TOLERANCE, relative_error

from multitensor.kernels import reference
from multitensor.kernels.projection import Projection
from multitensor.kernels.torch_kernels import Kernels
from multitensor.kernels.triton import attention, norm, rotary

pytestmark = MARKS
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check_attention(case: Case, window: int | None, softcap: float | None, tolerance: float) -> None:
    decodes = attention.Decodes.of(case.inputs)
    assert decodes is not None
    heads = attention.HeadTable(case.kv_map, case.k_cache.shape[2], torch.device(DEVICE))
    got = attention.attend(case.q, case.k_cache, case.v_cache, decodes, heads, 0.3, window, softcap)
    assert got.dtype == case.q.dtype
    expected = case.dense(0.3, window, softcap)[decodes.rows.cpu().numpy()]
    np.testing.assert_allclose(got.cpu().double().numpy(), expected, atol=tolerance)


@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_decodes_of_a_mixed_batch(window: int | None, softcap: float | None) -> None:
    """Sequences of none, one and several new tokens; a head table in no order; contexts that are cut into parts."""
    case = Case([1, 4, 1, 1, 0, 1], [30, 2, 0, 170, 3, 300], (2, 0, 0, 1, 1, 0), 3, 16, 16, seed=3, device=DEVICE)
    check_attention(case, window, softcap, 3e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [20, 80])
def test_attention_in_halves(dtype: torch.dtype, head_dim: int) -> None:
    case = Case([1, 1], [6, 140], (0, 0, 1), 2, head_dim, 8, seed=4, cache_dtype=dtype, dtype=dtype, device=DEVICE)
    check_attention(case, None, None, 4e-3 if dtype is torch.float16 else 3e-2)


def test_queries_and_cache_of_different_types() -> None:
    case = Case([1, 1], [6, 40], (0, 1), 2, seed=5, cache_dtype=torch.float16, device=DEVICE)
    check_attention(case, None, None, 3e-6)


def test_more_query_heads_a_kv_head_than_a_tile_has_at_least() -> None:
    check_attention(Case([1], [20], (0,) * 20 + (2,), 3, seed=6, device=DEVICE), None, None, 3e-6)


def test_a_step_without_decodes() -> None:
    assert attention.Decodes.of(Case([4, 0], [2, 3], (0,), 1, device=DEVICE).inputs) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("post", [False, True])
def test_add_and_norm(dtype: torch.dtype, offset: float, post: bool) -> None:
    x, residual, weight = random(5, 96, seed=7, dtype=dtype), random(5, 96, seed=8), random(96, seed=9)
    post_weight = random(96, seed=10) if post else None
    expected = reference.add_rms_norm(x, residual.clone(), weight, 1e-5, offset, post_weight)
    normed, stream = norm.add_rms_norm(x, residual, weight, 1e-5, offset, post_weight)
    assert stream is residual
    assert normed.dtype == dtype
    assert relative_error(normed, expected[0]) < TOLERANCE[dtype]
    # The product before the sum is in x's type where there is a norm before it.
    assert relative_error(stream, expected[1]) < (TOLERANCE[dtype] if post else 1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads(dtype: torch.dtype) -> None:
    x, weight = random(4, 3, 40, seed=11, dtype=dtype), random(40, seed=12)
    got = norm.rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    assert got.shape == x.shape
    assert relative_error(got, reference.rms_norm(x, weight, 1e-5)) < TOLERANCE[dtype]


def test_what_the_norm_does_not_take() -> None:
    x, weight = random(4, 64, seed=13), random(64, seed=14)
    assert norm.takes(x, weight, x.clone())
    assert not norm.takes(x[:, ::2], weight[:32])
    assert not norm.takes(x, weight, x.half())
    assert not norm.takes(x[:0], weight)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("rotated", [20, 10])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [(torch.float32, torch.float16), (torch.float16,) * 2, (torch.bfloat16,) * 2]
)
def test_rotation_and_cache(
    style: str, rotated: int, normed: bool, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    size, tokens = 20, 6
    norms = (random(size, seed=15), random(size, seed=16)) if normed else (None, None)
    projection = Projection((None,) * 3, None, size, style, *norms, 1e-5)  # type: ignore[arg-type]
    # Query, key and value side by side, as a joined product leaves them.
    qkv = random(tokens, 7, size, seed=17, dtype=dtype)
    q, k, v = qkv[:, :3], qkv[:, 3:5], qkv[:, 5:]
    angles = random(tokens, rotated // 2, seed=18) * 5
    slots = torch.tensor([3, 9, 1, 12, 7, 15], device=DEVICE)
    expected_caches = [torch.zeros(4, 4, 2, size, dtype=cache_dtype, device=DEVICE) for _ in range(2)]
    caches = [cache.clone() for cache in expected_caches]
    arguments = (projection, angles.cos(), angles.sin())
    assert rotary.takes(q, projection, angles, *caches)
    expected = Kernels(torch.device(DEVICE), True).place_heads(
        q.clone(), k.clone(), v, *arguments, *expected_caches, slots
    )
    got = rotary.place_heads(q, k, v, *arguments, *caches, slots)
    assert got.dtype == dtype
    for mine, right in zip((got, *caches), (expected, *expected_caches), strict=True):
        assert relative_error(mine, right) < TOLERANCE[max(dtype, right.dtype, key=lambda t: TOLERANCE[t])]
    assert torch.equal(caches[1], expected_caches[1])
