"""Every bit of every weight, whole and cut at every unit, against the gguf package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import COMPUTABLE, QUANTISED, oracle, random_raw, slice_of

from multitensor.errors import InputError
from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.repack import repack


def bits(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(values)).view(np.uint32)


def test_every_computable_type_is_covered() -> None:
    assert sorted(COMPUTABLE) == sorted(name for name, type in QUANT_TYPES.items() if type.computable)


@pytest.mark.parametrize("name", COMPUTABLE)
def test_whole_tensor_equals_oracle_bit_for_bit(name: str) -> None:
    type = QUANT_TYPES[name]
    raw = random_raw(type, 37, 1024, seed=1)
    got = dequantize(slice_of(type, raw, 0, 1024))
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(bits(got), bits(oracle(type, raw)))


@pytest.mark.parametrize("name", COMPUTABLE)
def test_every_single_unit_equals_oracle(name: str) -> None:
    type = QUANT_TYPES[name]
    raw = random_raw(type, 5, 768, seed=2)
    whole = oracle(type, raw)
    for start in range(0, 768, type.cut_unit):
        stop = start + type.cut_unit
        got = dequantize(slice_of(type, raw, start, stop))
        np.testing.assert_array_equal(bits(got), bits(whole[:, start:stop]), err_msg=f"{start}:{stop}")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(COMPUTABLE), rows=st.integers(0, 9), blocks=st.integers(1, 4))
def test_any_cut_equals_oracle_and_the_declared_size(data: st.DataObject, name: str, rows: int, blocks: int) -> None:
    type = QUANT_TYPES[name]
    cols = blocks * max(type.block_weights, 32)
    raw = random_raw(type, rows, cols, seed=data.draw(st.integers(0, 2**32 - 1)))
    units = cols // type.cut_unit
    start = data.draw(st.integers(0, units)) * type.cut_unit
    stop = data.draw(st.integers(start // type.cut_unit, units)) * type.cut_unit
    w = slice_of(type, raw, start, stop)
    assert w.nbytes == type.resident_bytes(rows, start, stop)
    for plane in type.planes:
        tensor = w.planes[plane.name]
        assert tensor.dtype == getattr(torch, plane.dtype)
        assert tensor.shape == (rows, plane.row_items(start, stop))
        assert tensor.is_contiguous()
    expected = oracle(type, raw)[:, start:stop] if rows else np.zeros((0, stop - start), np.float32)
    np.testing.assert_array_equal(bits(dequantize(w)), bits(expected))
    if rows:
        first = data.draw(st.integers(0, rows))
        np.testing.assert_array_equal(bits(dequantize(w, slice(first, rows))), bits(expected[first:]))
        picked = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=5)), dtype=torch.int64)
        np.testing.assert_array_equal(bits(dequantize(w, picked)), bits(expected[np.asarray(picked)]))


def test_float_rows_may_end_anywhere() -> None:
    type = QUANT_TYPES["BF16"]
    raw = random_raw(type, 3, 45, seed=3)
    got = dequantize(slice_of(type, raw, 32, 45))
    np.testing.assert_array_equal(bits(got), bits(oracle(type, raw)[:, 32:45]))


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F16"])
def test_planes_never_share_memory_with_the_bytes_read(name: str) -> None:
    type = QUANT_TYPES[name]
    raw = torch.from_numpy(random_raw(type, 2, 256, seed=4))
    planes = repack(type, raw, 0, 0, 256)
    before = {key: plane.clone() for key, plane in planes.items()}
    raw.zero_()
    for key, plane in planes.items():
        assert torch.equal(plane.view(torch.uint8), before[key].view(torch.uint8)), key


@pytest.mark.parametrize("name", QUANTISED)
def test_a_cut_inside_a_unit_is_refused(name: str) -> None:
    type = QUANT_TYPES[name]
    raw = torch.from_numpy(random_raw(type, 1, 256, seed=5))
    with pytest.raises(InputError, match="unit"):
        repack(type, raw, 0, 8, 256)


def test_a_type_without_kernel_is_named() -> None:
    type = QUANT_TYPES["IQ1_S"]
    raw = torch.zeros((1, 50), dtype=torch.uint8)
    with pytest.raises(InputError, match="IQ1_S"):
        repack(type, raw, 0, 0, 256)
    with pytest.raises(InputError, match="IQ1_S"):
        dequantize(QuantTensor(type, 1, 256, {"raw": raw}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", COMPUTABLE)
def test_on_a_gpu_repacking_and_dequantising_give_the_same_bits(name: str) -> None:
    type = QUANT_TYPES[name]
    raw = random_raw(type, 37, 1024, seed=6)
    for start, stop in ((0, 1024), (type.cut_unit, 1024 - type.cut_unit)):
        got = dequantize(slice_of(type, raw, start, stop, device="cuda")).cpu()
        np.testing.assert_array_equal(bits(got), bits(oracle(type, raw)[:, start:stop]))
