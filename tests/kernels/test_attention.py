"""Paged attention against dense float64 attention: random block tables, windows, softcaps and head tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import Case

from multitensor.kernels import attention, attention_inputs
from multitensor.kernels.attention import HeadGroups, paged_attention
from multitensor.kernels.attention_inputs import AttentionInputs

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    sequences = draw(
        st.lists(
            st.tuples(st.one_of(st.just(1), st.integers(0, 9)), st.one_of(st.just(0), st.integers(0, 21))),
            min_size=1,
            max_size=5,
        )
    )
    return [q for q, _ in sequences], [c for _, c in sequences]


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=120, deadline=None)
@given(
    batch=batches(),
    kv_map=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.one_of(st.none(), st.integers(1, 12)),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 1000),
)
def test_any_batch_equals_dense_attention(
    device: str,
    batch: tuple[list[int], list[int]],
    kv_map: list[int],
    block_size: int,
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    Case(*batch, tuple(kv_map), 3, block_size=block_size, seed=seed, device=device).check(window, softcap)


@pytest.mark.parametrize("kv_map", [(0, 0, 0, 1, 1, 1), (0, 0, 1, 1, 1, 2), (1, 0), (0,), (2, 2, 0)])
@pytest.mark.parametrize("batched", [False, True])
def test_decode_batch_with_head_tables(kv_map: tuple[int, ...], batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's batched decode runs on the CPU as well when it is told to."""
    if batched:
        monkeypatch.setattr(attention, "batches_decodes", lambda device: True)
    case = Case([1, 4, 1, 1], [30, 2, 0, 17], kv_map, 3, seed=3)
    case.check()
    case.check(window=5)
    case.check(softcap=1.5)
    case.check(window=40, softcap=1.5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("batched", [False, True])
def test_bounded_scratch_gives_the_same(
    batched: bool, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "batches_decodes", lambda device: batched)
    monkeypatch.setattr(attention, "SCORE_ELEMENTS", 200)  # a few queries at a time
    monkeypatch.setattr(attention, "WINDOW_QUERIES", 2)
    monkeypatch.setattr(attention, "GATHER_BYTES", 2000)  # one KV head, one or two sequences at a time
    Case([13, 1, 1, 20, 1], [5, 9, 31, 0, 2], (0, 0, 1, 1, 2), 3, seed=4).check(window, softcap)


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_cache_is_read_exactly(cache_dtype: torch.dtype) -> None:
    Case([3, 1], [6, 11], (0, 1, 1), 2, cache_dtype=cache_dtype).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 20])
def test_half_precision_queries(device: str, dtype: torch.dtype, head_dim: int) -> None:
    tolerance = 4e-3 if dtype == torch.float16 else 3e-2
    case = Case(
        [9, 1, 1, 30], [6, 40, 0, 0], (0, 0, 1, 2), 3, head_dim, 16, cache_dtype=dtype, dtype=dtype, device=device
    )
    case.check(tolerance=tolerance)
    case.check(window=8, tolerance=tolerance)
    case.check(softcap=5.0, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_road_of_a_gpu_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on the CPU: batched decode, and products of halves."""
    monkeypatch.setattr(attention, "batches_decodes", lambda device: True)
    monkeypatch.setattr(attention, "working_dtype", lambda q, k_cache, softcap: q.dtype)
    tolerance = 4e-3 if dtype == torch.float16 else 3e-2
    case = Case([9, 1, 1, 30], [6, 40, 0, 0], (0, 0, 1, 2), 3, 32, 16, cache_dtype=dtype, dtype=dtype)
    case.check(tolerance=tolerance)
    case.check(window=8, tolerance=tolerance)
    case.check(softcap=5.0, tolerance=tolerance)


def test_no_local_heads_and_no_tokens() -> None:
    case = Case([2, 1], [3, 4], (), 0)
    assert paged_attention(case.q, case.k_cache, case.v_cache, case.inputs, (), 1.0).shape == (3, 0, 16)
    empty = Case([0], [3], (0, 1), 2)
    assert paged_attention(empty.q, empty.k_cache, empty.v_cache, empty.inputs, (0, 1), 1.0).shape == (0, 2, 16)


def test_long_prefill_keeps_its_scratch_bounded() -> None:
    """12,000 queries and keys of 8 heads: all scores at once would take 4.6 GB."""
    tokens, heads = 12000, 8
    inputs = AttentionInputs.build([2000], [tokens - 2000], np.arange(tokens // 16)[None], 16, CPU)
    cache = torch.randn(tokens // 16, 16, 1, 8)
    q = torch.randn(2000, heads, 8)
    sizes: list[int] = []
    original = attention._Attend._softmax

    def spy(self: attention._Attend, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        sizes.append(scores.numel() * 4)
        return original(self, scores, mask)

    attention._Attend._softmax = spy  # type: ignore[method-assign]
    try:
        paged_attention(q, cache, cache, inputs, (0,) * heads, 1.0, softcap=4.0)
    finally:
        attention._Attend._softmax = original  # type: ignore[method-assign]
    assert max(sizes) <= 64 << 20
    assert len(sizes) > 1


def test_head_groups_pad_and_restore_any_table() -> None:
    groups = HeadGroups((2, 0, 2, 2, 0), 4, CPU)
    q = torch.randn(3, 5, 8)
    split = groups.split(q)
    assert split.shape == (3, 4, 3, 8)
    assert torch.equal(split[:, 2], q[:, [0, 2, 3]])
    assert torch.equal(split[:, 0, :2], q[:, [1, 4]])
    assert torch.equal(groups.merge(split), q)


def test_inputs_of_a_mixed_step() -> None:
    tables = np.array([[7, 2, 0], [5, 9, 4]], dtype=np.int32)
    inputs = AttentionInputs.build([3, 1], [2, 8], tables, 4, CPU)
    assert inputs.query_starts == [0, 3]
    assert inputs.positions.tolist() == [2, 3, 4, 8]
    assert inputs.slot_mapping.tolist() == [7 * 4 + 2, 7 * 4 + 3, 2 * 4, 4 * 4]
    assert inputs.block_tables.dtype == torch.int64
    assert inputs.has_decodes


def test_a_steps_numbers_reach_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    plain = attention_inputs.to_device

    def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
        copied.append(values.size)
        return plain(values, device)

    monkeypatch.setattr(attention_inputs, "to_device", to_device)
    tables = np.array([[5, 2, 0], [1, 7, 3]], np.int32)
    inputs = AttentionInputs.build([3, 1], [4, 9], tables, 4, torch.device("cpu"))
    assert copied == [4 + 4 + 6]
    assert inputs.positions.tolist() == [4, 5, 6, 9]
    assert inputs.slot_mapping.tolist() == [8, 9, 10, 13]
    assert inputs.block_tables.tolist() == tables.tolist()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("context", [0, 11])
def test_keys_that_lie_in_one_piece_are_read_in_place(
    window: int | None, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what scattered keys give; nothing is copied, nor cut where a copy would have been too large."""
    case = Case([1, 9], [4, context], (0, 0, 1), 2, 16, 4, seed=1)
    tables, blocks = case.inputs.block_tables.numpy(), -(-(context + 9) // 4)
    assert case.inputs.first_slots == [None, None]
    arguments: tuple[Any, ...] = (case.kv_map, 0.3, window)
    wanted = paged_attention(case.q, case.k_cache, case.v_cache, case.inputs, *arguments)
    # The second sequence's blocks once more, one behind the other.
    keys, values = (torch.cat((cache, cache[tables[1, :blocks]])) for cache in (case.k_cache, case.v_cache))
    n = len(case.k_cache)
    moved = tables.copy()
    moved[1, :blocks] = range(n, n + blocks)
    inputs = AttentionInputs.build([1, 9], [4, context], moved, 4, CPU)
    assert inputs.first_slots == [None, 4 * n]
    gathered = []
    plain = attention._Attend._gather
    monkeypatch.setattr(attention._Attend, "_gather", lambda *a: gathered.append(len(a[2])) or plain(*a))
    found = paged_attention(case.q, keys, values, inputs, *arguments)
    assert torch.equal(found, wanted)
    assert gathered == [5, 5]  # the lone token's keys and values
