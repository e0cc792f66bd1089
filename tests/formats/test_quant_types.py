"""The table of types against the gguf package, and the three sizes of a slice as properties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given
from hypothesis import strategies as st

from multitensor.errors import InputError
from multitensor.formats.quant_types import QUANT_TYPES, QUANT_TYPES_BY_ID, QuantType, quant_type

NOT_IN_FILES = {"Q8_1", "Q8_K"}  # ggml's types of activations
COMPUTABLE = {
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
}
BITS = {"uint8": 8, "int8": 8, "float16": 16, "bfloat16": 16, "float32": 32}


def test_geometry_is_ggmls() -> None:
    theirs = {(int(k), k.name, *v) for k, v in GGML_QUANT_SIZES.items() if k.name not in NOT_IN_FILES}
    ours = {(i, t.name, t.block_weights, t.block_bytes) for i, t in QUANT_TYPES_BY_ID.items()}
    assert theirs <= ours
    assert {t.name for t in QUANT_TYPES.values() if t.computable} == COMPUTABLE


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_planes_are_consistent(name: str) -> None:
    kind = QUANT_TYPES[name]
    assert quant_type(name) is kind and quant_type(name.lower()) is kind
    assert kind.block_weights % kind.cut_unit == 0 or kind.cut_unit % kind.block_weights == 0
    assert len({plane.name for plane in kind.planes}) == len(kind.planes)
    for plane in kind.planes:
        # A plane either follows every cut, or spans whole super-blocks and is copied to both sides.
        assert kind.cut_unit % plane.weights == 0 or plane.weights == kind.block_weights
        if name in COMPUTABLE:
            assert plane.itemsize * 8 == BITS[plane.dtype]


@pytest.mark.parametrize(
    ("name", "bits"), [("Q4_0", 4.5), ("Q4_K", 4.625), ("Q6_K", 6.5625), ("Q3_K", 3.5625), ("F16", 16), ("MXFP4", 4.25)]
)
def test_resident_bits_a_weight(name: str, bits: float) -> None:
    assert quant_type(name).resident_bytes(3, 0, 512) * 8 == bits * 3 * 512


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="unknown tensor type 'Q9_K'; known: F32"):
        quant_type("Q9_K")


@st.composite
def cuts(draw: st.DrawFn) -> tuple[QuantType, int, int, list[int]]:
    """A type, rows, columns (whole blocks), and legal cut points from 0 to columns, some of them equal."""
    kind = QUANT_TYPES[draw(st.sampled_from(sorted(QUANT_TYPES)))]
    step = max(kind.block_weights, kind.cut_unit)
    columns = draw(st.integers(1, 12)) * step
    points = draw(st.lists(st.integers(0, columns // kind.cut_unit), max_size=15))
    return kind, draw(st.integers(1, 9)), columns, [0, *sorted(p * kind.cut_unit for p in points), columns]


@given(cuts())
def test_resident_sums_over_cuts(case: tuple[QuantType, int, int, list[int]]) -> None:
    kind, rows, columns, points = case
    whole = kind.resident_bytes(rows, 0, columns)
    parts = [kind.resident_bytes(rows, a, b) for a, b in pairwise(points)]
    # Each cut inside a super-block copies that super-block's own values once, nothing else.
    inside = [p for p in set(points) if p % kind.block_weights]
    shared = sum(p.items * p.itemsize for p in kind.planes if kind.cut_unit % p.weights)
    assert sum(parts) == whole + len(inside) * shared * rows
    for a, b, size in zip(points, points[1:], parts, strict=False):
        arrays = [np.empty((rows, p.row_items(a, b), p.itemsize), np.uint8) for p in kind.planes]
        assert size == sum(array.nbytes for array in arrays)


@given(cuts())
def test_read_covers_the_slice_with_whole_blocks_and_no_more(case: tuple[QuantType, int, int, list[int]]) -> None:
    kind, rows, columns, points = case
    assert kind.read_bytes(rows, 0, columns) == rows * kind.row_bytes(columns)
    for a, b in pairwise(points):
        first, last = kind.read_columns(a, b)
        if a == b:
            assert first == last and kind.read_bytes(rows, a, b) == kind.resident_bytes(rows, a, b) == 0
            continue
        assert first <= a < first + kind.block_weights and last - kind.block_weights < b <= last <= columns
        assert first % kind.block_weights == last % kind.block_weights == 0
        assert kind.read_bytes(rows, a, b) == rows * (last - first) // kind.block_weights * kind.block_bytes


def test_a_short_tail_of_floats_is_counted_exactly() -> None:
    assert quant_type("F16").resident_bytes(2, 64, 81) == quant_type("F16").read_bytes(2, 64, 81) == 2 * 17 * 2
