"""Norms, activations, rope, cache and attention of the native CPU kernels on every level, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_levels import AVAILABLE, kernels, poisoned_outputs, random, relative_error

from multitensor.kernels import reference
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cpu.native import NativeKernels, load

__all__ = ["kernels", "poisoned_outputs"]  # fixtures


@pytest.mark.parametrize("shape", [(3, 576), (40, 7), (5, 9, 64), (1, 5), (0, 64)])
def test_norms(kernels: NativeKernels, shape: tuple[int, ...]) -> None:
    x, residual, weight = random(*shape), random(*shape, seed=1), random(shape[-1], seed=2)

    def expected(value: torch.Tensor) -> np.ndarray:
        return reference.rms_norm(value.double(), weight, 1e-5, 1.0).double().numpy()

    assert relative_error(kernels.rms_norm(x, weight, 1e-5, 1.0), expected(x)) < 1e-6
    total = x + residual
    got, same = kernels.add_rms_norm(x, residual, weight, 1e-5, 1.0)
    assert same is residual and torch.equal(residual, total)
    assert relative_error(got, expected(total)) < 1e-6


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_activation(kernels: NativeKernels, kind: str) -> None:
    gate = torch.cat(
        [torch.linspace(-80, 80, 4001), torch.linspace(-3, 3, 1000), torch.tensor([0.0, 1e-30, -1e30, 1e30])]
    )
    up = random(gate.numel())
    wide = gate.double()
    inner = wide if kind == "silu" else 1.5957691216057308 * (wide + 0.044715 * wide**3)
    expected = wide / (1 + torch.exp(-inner)) * up
    got = kernels.gated_activation(gate, up, kind)
    assert ((got - expected).abs() <= 1e-6 * expected.abs() + 1e-12).all()
    assert kernels.gated_activation(torch.tensor([math.nan]), torch.ones(1), kind).isnan().all()


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize("rotated", [32, 20, 2, 0])
def test_rope(kernels: NativeKernels, style: str, rotated: int) -> None:
    q, k = random(5, 3, 32), random(5, 2, 32, seed=1)
    angles = random(5, rotated // 2, seed=2) * 10
    cos, sin = angles.cos(), angles.sin()
    expected = [reference.apply_rope(x.double(), cos.double(), sin.double(), style).numpy() for x in (q, k)]
    got = kernels.apply_rope(q, cos, sin, style, k)
    assert got is q
    assert relative_error(q, expected[0]) < 1e-6 and relative_error(k, expected[1]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_write_kv_rounds_as_torch_does(kernels: NativeKernels, dtype: torch.dtype) -> None:
    tokens, heads, head_dim = 6, 3, 20
    k = random(tokens, heads, head_dim) * torch.logspace(-9, 6, head_dim)  # subnormal halves and overflow too
    v = k.flip(0).contiguous()
    k[0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 65519.996])
    slots = torch.tensor([7, 0, 11, 3, 2, 9])
    caches = [torch.full((4, 3, heads, head_dim), -1.0, dtype=dtype) for _ in range(4)]
    kernels.write_kv(k, v, caches[0], caches[1], slots)
    reference.write_kv(k, v, caches[2], caches[3], slots)
    for got, expected in zip(caches[:2], caches[2:], strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(0.5), expected.nan_to_num(0.5))
    with pytest.raises(ValueError, match="outside the cache"):
        kernels.write_kv(k, v, caches[0], caches[1], slots + 1)


class Sequences:
    """Random keys and values in a paged cache whose other places are NaN."""

    def __init__(
        self,
        query_lens: list[int],
        context_lens: list[int],
        n_kv_heads: int,
        head_dim: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rng = np.random.default_rng(0)
        lengths = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
        counts = [-(-length // block_size) for length in lengths]
        physical = rng.permutation(sum(counts) + 2)
        tables = np.zeros((len(lengths), max(counts, default=0) + 1), dtype=np.int64)
        self.k_cache = torch.full((len(physical), block_size, n_kv_heads, head_dim), math.nan, dtype=dtype)
        self.v_cache = self.k_cache.clone()
        self.keys, self.values = [], []
        used = 0
        for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            tables[s, :count] = physical[used : used + count]
            used += count
            places = [tables[s, p // block_size] * block_size + p % block_size for p in range(length)]
            for cache, kept in ((self.k_cache, self.keys), (self.v_cache, self.values)):
                drawn = torch.from_numpy(rng.standard_normal((length, n_kv_heads, head_dim))).to(dtype)
                cache.flatten(0, 1)[places] = drawn
                kept.append(drawn.double())
        self.inputs = AttentionInputs.build(query_lens, context_lens, tables, block_size, torch.device("cpu"))

    def expected(
        self, q: torch.Tensor, kv_map: tuple[int, ...], scale: float, window: int | None, softcap: float | None
    ) -> np.ndarray:
        """Dense float64 attention."""
        results = []
        for s, length in enumerate(self.inputs.query_lens):
            start, context = self.inputs.query_starts[s], self.inputs.context_lens[s]
            keys, values = self.keys[s][:, list(kv_map)], self.values[s][:, list(kv_map)]
            scores = torch.einsum("qhd,khd->hqk", q[start : start + length].double(), keys) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            distance = (context + torch.arange(length))[:, None] - torch.arange(context + length)
            hidden = (distance < 0) | (distance >= (window or 1 << 40))
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            results.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(results).numpy() if results else np.zeros(q.shape)


@pytest.mark.parametrize(
    ("query_lens", "context_lens", "kv_map", "head_dim", "window", "softcap", "dtype"),
    [
        ([1], [0], (0,), 64, None, None, torch.float32),
        ([1, 1, 1], [5, 200, 63], (0, 0, 0, 1, 1, 1, 2, 2, 2), 64, None, None, torch.float16),
        ([150], [0], (0, 0, 0, 1, 1), 64, None, None, torch.float16),
        ([70, 1, 33], [100, 300, 0], (0, 1), 80, None, None, torch.float32),
        ([70, 1, 33, 2], [100, 300, 0, 64], (1, 0, 1), 24, 37, None, torch.bfloat16),
        ([5, 1], [61, 129], (0, 0, 0, 0), 256, 64, None, torch.float16),
        ([40, 1], [10, 77], (0, 0, 1), 17, None, 5.0, torch.float32),
        ([40, 1], [10, 77], (2, 2, 0), 32, 20, 0.5, torch.float16),
        ([1], [3000], (0, 0), 64, None, None, torch.float16),  # keys are split
        ([3, 1], [2500, 90], (0,), 48, 2000, 3.0, torch.float32),
        ([0, 2, 0], [5, 0, 0], (0,), 16, None, None, torch.float32),
    ],
)
def test_attention_equals_float64(
    kernels: NativeKernels,
    query_lens: list[int],
    context_lens: list[int],
    kv_map: tuple[int, ...],
    head_dim: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    case = Sequences(query_lens, context_lens, max(kv_map) + 1, head_dim, dtype=dtype)
    q = random(sum(query_lens), len(kv_map), head_dim, seed=1)
    for scale in (head_dim**-0.5, 0.4):
        got = kernels.paged_attention(q, case.k_cache, case.v_cache, case.inputs, kv_map, scale, window, softcap)
        assert relative_error(got, case.expected(q, kv_map, scale, window, softcap)) < 5e-6


@settings(max_examples=40, deadline=None)
@given(data=st.data(), level=st.sampled_from(AVAILABLE))
def test_attention_of_any_batch(data: st.DataObject, level: str) -> None:
    lens = data.draw(
        st.lists(st.tuples(st.sampled_from([1, 2, 9, 70]), st.integers(0, 140)), min_size=1, max_size=4), "lens"
    )
    kv_map = tuple(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6), "kv_map"))
    head_dim, block_size = data.draw(st.sampled_from([8, 40, 64])), data.draw(st.sampled_from([1, 16, 24]))
    window = data.draw(st.one_of(st.none(), st.integers(1, 150)), "window")
    case = Sequences([q for q, _ in lens], [c for _, c in lens], 3, head_dim, block_size)
    q = random(sum(q for q, _ in lens), len(kv_map), head_dim)
    made = load(threads=2, level=level)
    assert made is not None
    got = made.paged_attention(q, case.k_cache, case.v_cache, case.inputs, kv_map, 0.2, window)
    made.close()
    assert relative_error(got, case.expected(q, kv_map, 0.2, window, None)) < 5e-6


def test_attention_refuses_what_lies_outside_the_cache(kernels: NativeKernels) -> None:
    case, q = Sequences([2], [20], 1, 16), random(2, 1, 16)
    with pytest.raises(ValueError, match="outside the cache"):
        kernels.paged_attention(q, case.k_cache, case.v_cache, case.inputs, (1,), 1.0)
    case.inputs.block_tables[0, 0] = case.k_cache.shape[0]
    with pytest.raises(ValueError, match="outside the cache"):
        kernels.paged_attention(q, case.k_cache, case.v_cache, replace(case.inputs), (0,), 1.0)


def test_not_a_number_reaches_the_attention_result(kernels: NativeKernels) -> None:
    case = Sequences([40], [0], 1, 32)
    q = random(40, 1, 32)
    q[7, 0, 3] = math.nan
    got = kernels.paged_attention(q, case.k_cache, case.v_cache, case.inputs, (0,), 1.0)
    assert got[7].isnan().all() and got[:7].isfinite().all() and got[8:].isfinite().all()
