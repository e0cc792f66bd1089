"""Every method of the chosen `Kernels` against the reference: native where built, and plain torch without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_weights import COMPUTABLE, random_tensor

from multitensor.kernels import dispatch, reference
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.dispatch import Kernels, make_kernels

CPU = torch.device("cpu")
EXACT, ROUNDED = 3e-6, 2e-2  # relative to the largest result; the second where activations are rounded to 8 bits
HALVES = {torch.float32: EXACT, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["built", "not built"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """make_kernels as it is on this machine, and as it is without the native library."""
    if request.param == "not built":
        monkeypatch.setattr(dispatch.native, "load", lambda threads: None)
    elif dispatch.native.load(1) is None:
        pytest.skip("the native kernels are not built")
    return lambda exact: make_kernels(CPU, exact, threads=1)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if expected.numel():
        error = (got.double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max(), error


def test_the_choice(make: object, request: pytest.FixtureRequest) -> None:
    assert make(True).name == ("torch" if request.node.callspec.id == "not built" else "native")


@pytest.mark.parametrize("name", COMPUTABLE)
@pytest.mark.parametrize("exact", [True, False])
def test_products(make: object, name: str, exact: bool) -> None:
    kernels: Kernels = make(exact)
    tolerance = EXACT if exact else ROUNDED
    gate, _ = random_tensor(name, 96, 512, seed=1)
    up, _ = random_tensor(name, 96, 512, seed=2)
    wide, _ = random_tensor(name, 33, 512, seed=3)
    for tokens in (0, 1, 3, 40):
        x, biases = random(tokens, 512, seed=4), [random(96, seed=5), None, random(33, seed=6)]
        expected = [reference.linear(x, w, b) for w, b in zip((gate, up, wide), biases, strict=True)]
        assert_close(kernels.linear(x, gate, biases[0]), expected[0], tolerance)
        for got, want in zip(kernels.linears(x, (gate, up, wide), biases), expected, strict=True):
            assert_close(got, want, tolerance)
        assert_close(kernels.linears(x, [wide])[0], reference.linear(x, wide), tolerance)
        for kind in ("silu", "gelu_tanh"):
            got = kernels.gated_linear(x, gate, up, kind, biases[0])
            assert_close(got, reference.gated_activation(expected[0], expected[1], kind), tolerance)


@pytest.mark.parametrize("name", COMPUTABLE)
def test_embedding(make: object, name: str) -> None:
    kernels: Kernels = make(True)
    w, _ = random_tensor(name, 11, 256, seed=7)
    ids = torch.tensor([3, -1, 10, 0, 11, 3])
    for dtype in HALVES:
        assert torch.equal(kernels.embedding(ids, w, dtype), reference.embedding(ids, w, dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_other_dtypes_are_kept(make: object, dtype: torch.dtype) -> None:
    kernels: Kernels = make(True)
    tolerance = HALVES[dtype]
    w, _ = random_tensor("Q8_0", 64, 96, seed=8)
    x, other, weight = random(5, 96, seed=9, dtype=dtype), random(5, 96, seed=10, dtype=dtype), random(96, seed=11)
    assert_close(kernels.linear(x, w), reference.linear(x, w), tolerance)
    assert_close(kernels.linears(x, [w])[0], reference.linear(x, w), tolerance)
    both = reference.gated_activation(reference.linear(x, w), reference.linear(x, w), "silu")
    assert_close(kernels.gated_linear(x, w, w, "silu"), both, 2 * tolerance)
    assert_close(kernels.gated_activation(x, other, "silu"), reference.gated_activation(x, other, "silu"), tolerance)
    for offset in (0.0, 1.0):
        assert_close(kernels.rms_norm(x, weight, 1e-5, offset), reference.rms_norm(x, weight, 1e-5, offset), tolerance)
        for residual_dtype in {dtype, torch.float32}:
            residual = random(5, 96, seed=12, dtype=residual_dtype)
            expected = reference.add_rms_norm(x, residual.clone(), weight, 1e-5, offset)
            normed, returned = kernels.add_rms_norm(x, residual, weight, 1e-5, offset)
            assert returned is residual
            assert_close(normed, expected[0], tolerance)
            assert_close(residual, expected[1], tolerance)
    heads = random(4, 3, 32, seed=13, dtype=dtype)
    assert_close(kernels.rms_norm(heads, weight[:32], 1e-5), reference.rms_norm(heads, weight[:32], 1e-5), tolerance)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("rotated", [32, 16])
@pytest.mark.parametrize("dtype", HALVES)
def test_rope(make: object, style: str, rotated: int, dtype: torch.dtype) -> None:
    kernels: Kernels = make(True)
    tolerance = HALVES[dtype]
    angles = random(6, rotated // 2, seed=14) * 5
    tables = angles.cos(), angles.sin()
    q, k = random(6, 3, 32, seed=15, dtype=dtype), random(6, 1, 32, seed=16, dtype=dtype)
    expected = [reference.apply_rope(x.clone(), *tables, style) for x in (q, k)]
    assert_close(kernels.apply_rope(q.clone(), *tables, style), expected[0], tolerance)
    for got, want in zip(kernels.apply_rope_pair(q.clone(), k.clone(), *tables, style), expected, strict=True):
        assert_close(got, want, tolerance)
    spread = q.transpose(0, 1).contiguous().transpose(0, 1)  # heads are not next to each other
    assert_close(kernels.apply_rope(spread, *tables, style), expected[0], tolerance)


@pytest.mark.parametrize("cache_dtype", HALVES)
@pytest.mark.parametrize("dtype", HALVES)
def test_cache_and_attention(make: object, cache_dtype: torch.dtype, dtype: torch.dtype) -> None:
    kernels: Kernels = make(True)
    inputs = AttentionInputs.build([1, 5, 1], [20, 3, 0], np.array([[1, 2, 3], [4, 0, 0], [5, 0, 0]]), 8, CPU)
    caches = [random(6, 8, 2, 32, seed=seed, dtype=cache_dtype) for seed in (17, 18)]
    expected_caches = [cache.clone() for cache in caches]
    k, v = random(7, 2, 32, seed=19, dtype=dtype), random(7, 2, 32, seed=20, dtype=dtype)
    kernels.write_kv(k, v, *caches, inputs.slot_mapping)
    reference.write_kv(k, v, *expected_caches, inputs.slot_mapping)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected_caches, strict=True))
    q = random(7, 3, 32, seed=21, dtype=dtype)
    for window, softcap in ((None, None), (4, None), (None, 2.0), (4, None)):
        got = kernels.paged_attention(q, *caches, inputs, (0, 1, 1), 0.3, window, softcap)
        expected = reference.paged_attention(q, *caches, inputs, (0, 1, 1), 0.3, window, softcap)
        assert_close(got, expected, 3 * HALVES[dtype])


def test_no_heads_and_no_tokens(make: object) -> None:
    kernels: Kernels = make(True)
    inputs = AttentionInputs.build([2], [0], np.array([[0]]), 8, CPU)
    cache = torch.zeros(1, 8, 0, 32)
    kernels.write_kv(torch.zeros(2, 0, 32), torch.zeros(2, 0, 32), cache, cache, inputs.slot_mapping)
    assert kernels.paged_attention(torch.zeros(2, 0, 32), cache, cache, inputs, (), 1.0).shape == (2, 0, 32)
    nothing = AttentionInputs.build([], [], np.zeros((0, 1), dtype=np.int64), 8, CPU)
    cache = torch.zeros(1, 8, 1, 32)
    assert kernels.paged_attention(torch.zeros(0, 2, 32), cache, cache, nothing, (0, 0), 1.0).shape == (0, 2, 32)
    assert kernels.rms_norm(torch.zeros(0, 32), torch.ones(32), 1e-5).shape == (0, 32)
