"""Products of the native CPU kernels on every instruction level that is here, against float64 and the gguf package."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_levels import AVAILABLE, kernels, poisoned_outputs, random, relative_error
from random_weights import COMPUTABLE, QUANTISED, oracle, random_raw, random_tensor, slice_of

from multitensor.errors import InputError
from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels import reference
from multitensor.kernels.cpu.native import NativeKernels, load
from multitensor.kernels.quant_tensor import QuantTensor

__all__ = ["kernels", "poisoned_outputs"]  # fixtures


def poison_scratch(kernels: NativeKernels, cols: int, tokens: int) -> None:
    """Leaves NaN wherever a call of this size keeps what it computes on the way."""
    for exact in (False, True):
        for name in ("Q2_K", "Q4_K"):
            w, _ = random_tensor(name, 64, -(-cols // 256) * 256, seed=0)
            for plane in w.planes.values():
                plane.view(torch.uint8).fill_(0xFF)
            kernels.linear(torch.full((tokens, w.cols), math.nan), w, exact=exact)


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
    for tokens in (1, 2, 3, 4, 5, 7, 8, 9, 30):
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
