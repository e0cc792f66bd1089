"""The native CPU kernels on every instruction level that this machine has, against float64 and the gguf package."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import COMPUTABLE, QUANTISED, oracle, random_raw, random_tensor, slice_of

from multitensor.errors import InputError
from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels import reference
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cpu.library import LEVELS, load_library
from multitensor.kernels.cpu.native import NativeKernels, load
from multitensor.kernels.quant_tensor import QuantTensor

LIBRARY = load_library()
if LIBRARY is None:
    pytest.skip("native CPU kernels are not built: python setup.py build_ext --inplace", allow_module_level=True)
AVAILABLE = LEVELS[: LIBRARY.mt_best_level() + 1]


@pytest.fixture(scope="module", params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[NativeKernels]:
    if request.param not in AVAILABLE:
        pytest.skip(f"this machine has no {request.param}")
    made = load(threads=2, level=request.param)
    assert made is not None and made.level == request.param
    yield made
    made.close()


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def poison_scratch(kernels: NativeKernels, cols: int, tokens: int) -> None:
    """Leaves NaN wherever a call of this size keeps what it computes on the way."""
    for exact in (False, True):
        for name in ("Q2_K", "Q4_K"):
            w, _ = random_tensor(name, 64, -(-cols // 256) * 256, seed=0)
            for plane in w.planes.values():
                plane.view(torch.uint8).fill_(0xFF)
            kernels.linear(torch.full((tokens, w.cols), math.nan), w, exact=exact)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(got.shape) == expected.shape
    if expected.size == 0:
        return 0.0
    return float(np.abs(got.double().numpy() - expected).max() / max(np.abs(expected).max(), 1e-30))


def rounded(x: torch.Tensor) -> np.ndarray:
    """What the fast path makes of activations: 8 bits, one float32 scale for every 32."""
    padded = np.zeros((x.shape[0], -(-x.shape[1] // 32) * 32), dtype=np.float32)
    padded[:, : x.shape[1]] = x.numpy()
    groups = padded.reshape(x.shape[0], -1, 32)
    most = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    values = np.rint(groups * inverse).astype(np.float64) * (most / np.float32(127)).astype(np.float64)
    return values.reshape(x.shape[0], -1)[:, : x.shape[1]]


def check_product(kernels: NativeKernels, w: QuantTensor, values: np.ndarray, x: torch.Tensor) -> None:
    """Both paths against float64: the exact one with x itself, the fast one with what rounding leaves of x."""
    bias = random(w.rows, seed=9)
    wide, added = values.astype(np.float64).T, bias.double().numpy()
    expected = x.double().numpy() @ wide + added
    # Of a sum whose terms have random signs; a single result may be much smaller by chance.
    typical = np.sqrt(x.double().numpy() ** 2 @ wide**2) + np.abs(added)

    def largest_error(got: torch.Tensor, wanted: np.ndarray) -> float:
        assert tuple(got.shape) == wanted.shape
        return float(np.abs(got.double().numpy() - wanted).max() / typical.max())

    assert largest_error(kernels.linear(x, w, bias, exact=True), expected) < 1e-5
    fast = kernels.linear(x, w, bias)
    if w.type.is_float:
        assert largest_error(fast, expected) < 1e-5
        return
    assert largest_error(fast, rounded(x) @ wide + added) < 1e-5
    tolerance = 1e-2 if fast.numel() >= 64 else 4e-2  # a few numbers may all be unlucky
    assert np.linalg.norm(fast.double().numpy() - expected) < tolerance * np.linalg.norm(typical) + 1e-30


# ---- weights ----


@pytest.mark.parametrize("name", COMPUTABLE)
def test_dequantize_is_bit_equal_to_gguf(kernels: NativeKernels, name: str) -> None:
    type = QUANT_TYPES[name]
    raw = random_raw(type, 19, 768, seed=1)  # all finite factors of float16
    unit = type.cut_unit
    for start, stop in ((0, 768), (unit, 768), (5 * unit, 5 * unit + 256 + unit), (768 - 3 * unit, 768), (64, 64)):
        expected = oracle(type, raw)[:, start:stop]
        w = slice_of(type, raw, start, stop)
        got = kernels.dequantize(w).numpy()
        assert np.array_equal(got.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))
        assert torch.equal(kernels.dequantize(w, slice(3, 11)), torch.from_numpy(got[3:11]))


def test_embedding_takes_rows_and_gives_zeros_outside(kernels: NativeKernels) -> None:
    w, values = random_tensor("Q6_K", 40, 512, seed=2)
    ids = torch.tensor([3, 39, -1, 40, 0, 3], dtype=torch.int32)
    expected = np.stack([values[i] if 0 <= i < 40 else np.zeros(512, np.float32) for i in ids.tolist()])
    assert torch.equal(kernels.embedding(ids, w), torch.from_numpy(expected))
    assert kernels.embedding(ids[:0], w).shape == (0, 512)


@pytest.mark.parametrize("name", COMPUTABLE)
def test_products_equal_float64(kernels: NativeKernels, name: str) -> None:
    w, values = random_tensor(name, 75, 768, seed=3)
    poison_scratch(kernels, 768, 30)
    for tokens in (1, 2, 3, 7, 8, 9, 30):
        check_product(kernels, w, values, random(tokens, 768, seed=tokens))


@pytest.mark.parametrize("name", ["F16", "Q2_K", "Q4_1", "Q5_K", "Q6_K", "Q8_0"])
def test_products_of_many_columns(kernels: NativeKernels, name: str) -> None:
    """More columns than a packed tile takes, a number of rows that fills no tile, more rows than a chunk."""
    w, values = random_tensor(name, 101, 9216 + 512, seed=4)
    for tokens in (1, 4, 13):
        check_product(kernels, w, values, random(tokens, w.cols, seed=tokens))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(QUANTISED), level=st.sampled_from(AVAILABLE))
def test_products_of_any_slice(data: st.DataObject, name: str, level: str) -> None:
    """Slices begin and end at any cut unit, in the middle of super-blocks too; rows and tokens as they come."""
    type = QUANT_TYPES[name]
    raw = random_raw(type, data.draw(st.integers(1, 70), "rows"), 1024, seed=5, scale=0.05)
    units = 1024 // type.cut_unit
    start = data.draw(st.integers(0, units - 1), "start") * type.cut_unit
    stop = data.draw(st.integers(start // type.cut_unit + 1, units), "stop") * type.cut_unit
    tokens = data.draw(st.sampled_from([1, 2, 5, 9, 14]), "tokens")
    made = load(threads=1, level=level)
    assert made is not None
    poison_scratch(made, 1024, tokens)
    check_product(
        made, slice_of(type, raw, start, stop), oracle(type, raw)[:, start:stop], random(tokens, stop - start, seed=6)
    )
    made.close()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("cols", [1, 15, 17, 63, 65, 130])
def test_float_weights_of_any_width(kernels: NativeKernels, name: str, cols: int) -> None:
    w, values = random_tensor(name, 9, cols, seed=7)
    poison_scratch(kernels, cols, 11)
    for tokens in (1, 3, 11):
        check_product(kernels, w, values, random(tokens, cols, seed=8))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "F16"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 12])
@pytest.mark.parametrize("exact", [False, True])
def test_empty_rows_columns_and_batches(kernels: NativeKernels, name: str, tokens: int, exact: bool) -> None:
    type = QUANT_TYPES[name]
    raw = random_raw(type, 6, 512, seed=7, scale=0.05)
    bias = random(6)
    no_columns = slice_of(type, raw, 256, 256)
    assert torch.equal(kernels.linear(torch.zeros(tokens, 0), no_columns, exact=exact), torch.zeros(tokens, 6))
    assert torch.equal(kernels.linear(torch.zeros(tokens, 0), no_columns, bias, exact=exact), bias.expand(tokens, 6))
    no_rows = slice_of(type, raw[:0], 0, 512)
    assert kernels.linear(torch.zeros(tokens, 512), no_rows, exact=exact).shape == (tokens, 0)


def test_rows_of_a_larger_plane_and_strided_activations(kernels: NativeKernels) -> None:
    w, values = random_tensor("Q4_K", 30, 512, seed=8)
    part = QuantTensor(w.type, 10, 512, {name: plane[5:15] for name, plane in w.planes.items()})
    check_product(kernels, part, values[5:15], random(2, 512))
    x = random(512, 3).T
    assert torch.equal(kernels.linear(x, w), kernels.linear(x.contiguous(), w))
    assert kernels.linear(random(2, 3, 512), w).shape == (2, 3, 30)


@pytest.mark.parametrize("tokens", [1, 4, 12])
@pytest.mark.parametrize("exact", [False, True])
def test_several_weights_in_one_call(kernels: NativeKernels, tokens: int, exact: bool) -> None:
    sizes = {"Q4_K": 40, "Q6_K": 33, "F16": 7, "Q8_0": 65}
    weights = [random_tensor(name, rows, 512, seed=9)[0] for name, rows in sizes.items()]
    weights.insert(1, slice_of(QUANT_TYPES["Q6_K"], np.zeros((0, 420), dtype=np.uint8), 0, 512))  # a rank without rows
    biases = [random(w.rows) if i % 2 else None for i, w in enumerate(weights)]
    x = random(tokens, 512, seed=10)
    for got, w, bias in zip(kernels.linears(x, weights, biases, exact=exact), weights, biases, strict=True):
        assert torch.equal(got, kernels.linear(x, w, bias, exact=exact))
    assert torch.equal(kernels.linears(x, weights[:1], exact=exact)[0], kernels.linear(x, weights[0], exact=exact))


@pytest.mark.parametrize("tokens", [0, 1, 4, 12])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("exact", [False, True])
def test_gated_linear(kernels: NativeKernels, tokens: int, kind: str, exact: bool) -> None:
    gate, up = (random_tensor("Q5_0", 77, 96, seed=seed)[0] for seed in (11, 12))
    gate_bias, up_bias, x = random(77, seed=1), random(77, seed=2), random(tokens, 96, seed=3)
    expected = reference.gated_activation(
        kernels.linear(x, gate, gate_bias, exact=exact).double(),
        kernels.linear(x, up, up_bias, exact=exact).double(),
        kind,
    )
    got = kernels.gated_linear(x, gate, up, kind, gate_bias, up_bias, exact=exact)
    assert relative_error(got, expected.numpy()) < 1e-6


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "F16"])
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_not_a_number_in_shows_outside(kernels: NativeKernels, name: str, tokens: int) -> None:
    w, _ = random_tensor(name, 40, 512, seed=13)
    for bad in (math.nan, math.inf):
        x = random(tokens, 512)
        x[-1, 100] = bad
        for exact in (False, True):
            got = kernels.linear(x, w, exact=exact)
            assert not got[-1].isfinite().any()
            assert got[:-1].isfinite().all()


def test_tiny_activations_round_to_nothing_harmful(kernels: NativeKernels) -> None:
    w, _ = random_tensor("Q4_0", 40, 512, seed=13)
    assert kernels.linear(torch.full((1, 512), 1e-40), w).abs().max() < 1e-30


@pytest.mark.parametrize("exact", [False, True])
def test_the_number_of_threads_changes_no_bit(exact: bool) -> None:
    w, _ = random_tensor("Q4_K", 999, 512, seed=14)
    results = []
    for threads in (1, 2, 5):
        made = load(threads=threads)
        assert made is not None
        results.append([made.linear(random(tokens, 512), w, exact=exact) for tokens in (1, 2, 64) for _ in range(20)])
        made.close()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_cannot_be_multiplied_is_refused(kernels: NativeKernels) -> None:
    w, _ = random_tensor("Q4_K", 4, 512, seed=15)
    with pytest.raises(ValueError, match="512"):
        kernels.linear(torch.zeros(1, 511), w)
    with pytest.raises(ValueError, match="bias has 3"):
        kernels.linear(torch.zeros(1, 512), w, torch.zeros(3))
    integers = QuantTensor(QUANT_TYPES["I32"], 2, 2, {"weight": torch.zeros(2, 2, dtype=torch.int32)})
    assert not kernels.supports(integers)
    with pytest.raises(InputError, match="I32"):
        kernels.linear(torch.zeros(1, 2), integers)
    short = QuantTensor(w.type, 4, 512, {**w.planes, "quants": w.planes["quants"][:, :-1]})
    with pytest.raises(InputError, match="plane quants"):
        kernels.linear(torch.zeros(1, 512), short)


def test_descriptors_go_with_their_tensors(kernels: NativeKernels) -> None:
    before = len(kernels._weights)
    w, _ = random_tensor("Q4_0", 4, 64, seed=16)
    kernels.linear(torch.zeros(1, 64), w)
    assert len(kernels._weights) == before + 1
    del w
    assert len(kernels._weights) == before


# ---- element-wise ----


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


# ---- the paged cache ----


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
        kernels.paged_attention(q, case.k_cache, case.v_cache, AttentionInputs(**vars(case.inputs)), (0,), 1.0)


def test_not_a_number_reaches_the_attention_result(kernels: NativeKernels) -> None:
    case = Sequences([40], [0], 1, 32)
    q = random(40, 1, 32)
    q[7, 0, 3] = math.nan
    got = kernels.paged_attention(q, case.k_cache, case.v_cache, case.inputs, (0,), 1.0)
    assert got[7].isnan().all() and got[:7].isfinite().all() and got[8:].isfinite().all()


# ---- threads, processes, shared memory ----


def test_ranks_as_threads_do_not_disturb_each_other() -> None:
    w, _ = random_tensor("Q4_0", 700, 512, seed=17)
    inputs = [random(1, 512, seed=i) for i in range(3)]
    made = [load(threads=2) for _ in inputs]
    shared = made[0]
    assert shared is not None
    expected = [shared.linear(x, w) for x in inputs]
    wrong: list[int] = []

    def run(rank: int) -> None:
        for _ in range(150):
            for own in (made[rank], shared):
                assert own is not None
                if not torch.equal(own.linear(inputs[rank], w), expected[rank]):
                    wrong.append(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for own in made:
        assert own is not None
        own.close()
        own.close()


def _child(own: NativeKernels, x: torch.Tensor, w: QuantTensor, expected: torch.Tensor) -> None:
    sys.exit(0 if torch.equal(own.linear(x, w), expected) else 3)


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_computes_alone() -> None:
    w, _ = random_tensor("Q4_0", 700, 512, seed=18)
    x = random(1, 512)
    own = load(threads=2)
    assert own is not None
    expected = own.linear(x, w)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(own, x, w, expected))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert torch.equal(own.linear(x, w), expected)
    own.close()


def test_a_process_ends_with_kernels_open() -> None:
    program = (
        "import torch; from multitensor.kernels.cpu.native import load; k = load(threads=3);"
        "k.rms_norm(torch.ones(400, 400), torch.ones(400), 1e-5); print('done')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "done\n" and result.stderr == ""


def test_reduction_adds_in_rank_order() -> None:
    assert LIBRARY is not None
    for n in (0, 1, 1000, 5000):
        ranks = [random(n, seed=seed) * 10.0**seed for seed in range(5)]
        expected = ranks[0].clone()
        for other in ranks[1:]:
            expected += other
        addresses = (ctypes.c_void_p * 5)(*[rank.data_ptr() for rank in ranks])
        LIBRARY.mt_reduce_sum_f32(ranks[2].data_ptr(), addresses, 5, n)
        assert torch.equal(ranks[2], expected)


def test_waiting_ends_with_the_value_or_the_time() -> None:
    assert LIBRARY is not None
    counter = ctypes.c_uint32(0xFFFFFFFE)
    address = ctypes.addressof(counter)
    started = time.monotonic()
    assert LIBRARY.mt_wait_until(address, 1, 100, 60) == 0
    assert 0.05 < time.monotonic() - started < 5
    assert LIBRARY.mt_wait_until(address, 0xFFFFFFFE, 0, -1) == 1
    poster = threading.Timer(0.1, lambda: LIBRARY.mt_post(address, 2))  # 4 further on, past the wrap
    poster.start()
    assert LIBRARY.mt_wait_until(address, 1, 100, 20_000) == 1
    poster.join()
