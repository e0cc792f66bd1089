"""Linear, embedding, norms, rope and activations against float64 and against transformers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import COMPUTABLE, random_raw, random_tensor, slice_of

from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels import reference
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.quant_tensor import QuantTensor

# Relative to the largest result: float32 sums of a few hundred products; halves are rounded once at the end.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}


def assert_close(got: torch.Tensor, expected: np.ndarray | torch.Tensor, tolerance: float) -> None:
    expected = np.asarray(expected, dtype=np.float64)
    assert got.shape == expected.shape
    if expected.size:
        error = np.abs(got.to(torch.float64).numpy() - expected).max()
        assert error <= tolerance * max(np.abs(expected).max(), 1e-30), error


@pytest.mark.parametrize("name", COMPUTABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_equals_float64(name: str, dtype: torch.dtype) -> None:
    w, values = random_tensor(name, 70, 512, seed=1)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(3))
    expected = x.double().numpy() @ values.astype(np.float64).T
    got = reference.linear(x, w)
    assert got.dtype == dtype
    assert_close(got, expected, TOLERANCE[dtype])
    assert_close(reference.linear(x, w, bias), expected + bias.double().numpy(), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "F16", "BF16"])
def test_linear_by_chunks_of_rows_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, _ = random_tensor(name, 23, 512, seed=4)
    x, bias = torch.randn(3, 512), torch.randn(23)
    whole = reference.linear(x, w, bias)
    monkeypatch.setattr(reference, "CPU_CHUNK_BYTES", 5 * 512 * 4)
    assert_close(reference.linear(x, w, bias), whole, 1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(COMPUTABLE), ranks=st.integers(1, 5))
def test_partial_sums_of_cut_columns_add_up(data: st.DataObject, name: str, ranks: int) -> None:
    type = QUANT_TYPES[name]
    raw = random_raw(type, 9, 768, seed=5, scale=0.05)
    units = 768 // type.cut_unit
    inner = sorted(data.draw(st.lists(st.integers(0, units), min_size=ranks - 1, max_size=ranks - 1)))
    cuts = [0, *inner, units]
    x = torch.randn(4, 768, generator=torch.Generator().manual_seed(6))
    total = torch.zeros(4, 9)
    for first, last in itertools.pairwise(cuts):
        start, stop = first * type.cut_unit, last * type.cut_unit
        total += reference.linear(x[:, start:stop], slice_of(type, raw, start, stop))
    assert_close(total, reference.linear(x, slice_of(type, raw, 0, 768)), 2e-6)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "F32", "F16"])
def test_empty_slices(name: str) -> None:
    type = QUANT_TYPES[name]
    raw = random_raw(type, 6, 512, seed=7, scale=0.05)
    bias = torch.randn(6)
    no_columns = slice_of(type, raw, 256, 256)
    assert torch.equal(reference.linear(torch.zeros(3, 0), no_columns), torch.zeros(3, 6))
    assert torch.equal(reference.linear(torch.zeros(3, 0), no_columns, bias), bias.expand(3, 6))
    no_rows = slice_of(type, raw[:0], 0, 512)
    assert reference.linear(torch.zeros(3, 512), no_rows).shape == (3, 0)
    assert torch.equal(reference.embedding(torch.tensor([0, 5]), no_rows), torch.zeros(2, 512))
    assert reference.linear(torch.zeros(0, 512), slice_of(type, raw, 0, 512)).shape == (0, 6)


@pytest.mark.parametrize("name", COMPUTABLE)
def test_embedding_gathers_rows_and_leaves_other_ranks_ids_zero(name: str) -> None:
    w, values = random_tensor(name, 11, 256, seed=8)
    ids = torch.tensor([3, -1, 10, 0, 11, 3], dtype=torch.int32)
    expected = values[[3, 0, 10, 0, 0, 3]]
    expected[[1, 4]] = 0
    got = reference.embedding(ids, w)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.from_numpy(expected))
    assert torch.equal(reference.embedding(ids, w, torch.bfloat16), got.to(torch.bfloat16))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_equals_float64(dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(9)
    x = (torch.randn(4, 3, 96, generator=generator) * 7).to(dtype)
    weight = torch.randn(96, generator=generator)
    wide = x.double()
    expected = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * (weight.double() + offset)
    got = reference.rms_norm(x, weight, 1e-5, offset)
    assert got.dtype == dtype
    assert_close(got, expected, TOLERANCE[dtype])
    assert reference.rms_norm(x[:0], weight, 1e-5, offset).shape == (0, 3, 96)


def test_add_rms_norm_adds_in_place() -> None:
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    expected = x + residual
    normed, returned = reference.add_rms_norm(x, residual, weight, 1e-6, 1.0)
    assert returned is residual
    assert torch.equal(residual, expected)
    assert torch.equal(normed, reference.rms_norm(expected, weight, 1e-6, 1.0))


def rope_tables(tokens: int, rotated: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angles = torch.arange(3, 3 + tokens, dtype=torch.float64).unsqueeze(1) * frequencies
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("rotated", [64, 32, 2])
@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rope_turns_each_pair_as_a_complex_number(style: str, rotated: int) -> None:
    x = torch.randn(6, 3, 64, generator=torch.Generator().manual_seed(10))
    cos, sin = rope_tables(6, rotated)
    part = x[..., :rotated].double()
    if style == "half":
        pairs = torch.complex(part[..., : rotated // 2], part[..., rotated // 2 :])
    else:
        pairs = torch.complex(part[..., 0::2], part[..., 1::2])
    turned = pairs * torch.complex(cos.double(), sin.double()).unsqueeze(1)
    expected = x.double().clone()
    if style == "half":
        expected[..., :rotated] = torch.cat((turned.real, turned.imag), -1)
    else:
        expected[..., :rotated] = torch.view_as_real(turned).flatten(-2)
    got = reference.apply_rope(x.clone(), cos, sin, style)
    assert_close(got, expected, 1e-6)
    assert torch.equal(got[..., rotated:], x[..., rotated:])
    halves = reference.apply_rope(x.to(torch.bfloat16), cos, sin, style)
    assert halves.dtype == torch.bfloat16
    assert_close(halves, expected, 1e-2)


def test_rope_equals_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")  # the interleaved style
    q = torch.randn(1, 4, 7, 32)  # [batch, heads, tokens, head_dim]
    cos, sin = rope_tables(7, 32)
    ours = q[0].transpose(0, 1)
    doubled = torch.cat((cos, cos), -1).unsqueeze(0), torch.cat((sin, sin), -1).unsqueeze(0)
    expected, _ = llama.apply_rotary_pos_emb(q, q, *doubled)
    assert_close(reference.apply_rope(ours.clone(), cos, sin, "half"), expected[0].transpose(0, 1), 1e-6)
    repeated = cos.repeat_interleave(2, -1).unsqueeze(0), sin.repeat_interleave(2, -1).unsqueeze(0)
    expected, _ = cohere.apply_rotary_pos_emb(q, q, *repeated)
    assert_close(reference.apply_rope(ours.clone(), cos, sin, "interleaved"), expected[0].transpose(0, 1), 1e-6)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_activation_equals_its_formula(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    gate = (torch.randn(5, 64, generator=generator) * 4).to(dtype)
    up = torch.randn(5, 64, generator=generator).to(dtype)
    g = gate.double()
    if kind == "silu":
        active = g / (1 + torch.exp(-g))
    else:
        active = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    got = reference.gated_activation(gate, up, kind)
    assert got.dtype == dtype
    assert_close(got, active * up.double(), TOLERANCE[dtype])
    assert reference.gated_activation(gate[:, :0], up[:, :0], kind).shape == (5, 0)


def test_dequantised_float_weights_need_no_copy() -> None:
    w = QuantTensor(QUANT_TYPES["F32"], 2, 3, {"weight": torch.randn(2, 3)})
    assert dequantize(w).data_ptr() == w.planes["weight"].data_ptr()
