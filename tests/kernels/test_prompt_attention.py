"""Attention of prompts in blocks that are joined, against the whole with a mask, on the CPU, parts in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import Case

from multitensor.kernels import attention
from multitensor.kernels import prompt_attention as prompts
from multitensor.kernels.prompt_attention import PromptAttention, attend_in_blocks, join, powers, with_mask

CPU = torch.device("cpu")


def numbers(heads: int, length: int, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * length + heads)
    return torch.randn(1, heads, length, size, generator=generator).to(dtype)


def plain_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal: aligned to the last key. Softmax and sums in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).double() for x in (k, v))
    scores = q.double() @ k.mT * scale
    n, total = scores.shape[-2:]
    if causal:
        seen = torch.ones(n, total, dtype=torch.bool).tril(total - n)
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).to(q.dtype), scores.logsumexp(-1).float()


def square_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As cuDNN: causal squares and whole rectangles, lengths powers of two."""
    n, total = q.shape[2], k.shape[2]
    assert n & (n - 1) == 0 and total & (total - 1) == 0 and n >= 4 and total >= 4
    assert n == total or not causal
    return plain_part(q, k, v, causal, scale)


@settings(max_examples=80, deadline=None)
@given(new=st.integers(1, 40), before=st.integers(0, 60), kv_heads=st.sampled_from([1, 2]), group=st.integers(1, 3))
def test_blocks_are_the_whole(new: int, before: int, kv_heads: int, group: int) -> None:
    q = numbers(kv_heads * group, new)
    k, v = (numbers(kv_heads, before + new, seed=s) for s in (1, 2))
    out = torch.full_like(q, float("nan"))
    attend_in_blocks(q, k, v, out, 0.3, square_part, plain_part, 4)
    wanted = with_mask(q, k, v, 0.3)
    assert (out - wanted).abs().max() < 1e-6  # weights of parts pass through float32


@given(length=st.integers(0, 300_000))
def test_sizes_of_blocks(length: int) -> None:
    sizes = list(powers(length, 1024))
    assert all(size & (size - 1) == 0 and 1024 <= size <= 1 << 16 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert 0 <= length - sum(sizes) < 1024


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_joining_costs_about_a_rounding(dtype: torch.dtype, limit: float) -> None:
    """In many pieces, of unlike weight."""
    q, k, v = numbers(4, 64, dtype=dtype), numbers(2, 512, seed=1, dtype=dtype), numbers(2, 512, seed=2, dtype=dtype)
    result = plain_part(q, k[:, :, :40], v[:, :, :40], False, 1.0)
    for low in range(40, 512, 59):
        keys = slice(low, low + 59)
        result = join(result, plain_part(q, k[:, :, keys], v[:, :, keys], False, 1.0))
    wanted, sums = plain_part(q.double(), k.double(), v.double(), False, 1.0)
    assert ((result[0].double() - wanted).norm() / wanted.norm()).item() < limit
    assert (result[1] - sums).abs().max() < 1e-4


class _Counting(PromptAttention):
    """Ways of a GPU over parts of the CPU; counts the calls of attend()."""

    def __init__(self, way: prompts.Way) -> None:
        super().__init__(CPU)
        self.ways = (way,)
        self.calls = 0

    def attend(self, *arguments: torch.Tensor | float) -> bool:
        self.calls += 1
        return super().attend(*arguments)  # type: ignore[arg-type]


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in half precision, with parts in plain torch."""
    monkeypatch.setattr(attention, "batches_decodes", lambda device: True)
    monkeypatch.setattr(attention, "working_dtype", lambda q, k_cache, softcap: q.dtype)
    monkeypatch.setattr(prompts, "flash_part", plain_part)
    monkeypatch.setattr(prompts, "cudnn_part", square_part)
    monkeypatch.setattr(prompts, "SMALLEST_BLOCK", 8)


@pytest.mark.parametrize("way", ["flash", "cudnn"])
@pytest.mark.parametrize("kv_map", [(0, 0, 1, 1), (0, 0, 1, 2), (2, 0, 0, 1)])
@pytest.mark.parametrize("gather", [32 << 20, 2000])
def test_through_the_paged_cache(
    way: prompts.Way, kv_map: tuple[int, ...], gather: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes, first chunks and later ones in one batch, at once or a few KV heads at a time; windows that hide nothing
    count as none, others and capped scores keep their way."""
    on_cpu(monkeypatch)
    monkeypatch.setattr(attention, "GATHER_BYTES", gather)
    half = torch.float16
    case = Case([9, 1, 30, 41], [6, 40, 0, 37], kv_map, 3, 16, cache_dtype=half, dtype=half)
    for window, softcap, calls in ((None, None, True), (200, None, True), (8, None, False), (None, 5.0, False)):
        ours = _Counting(way)
        case.check(window, softcap, tolerance=4e-3, prompts=ours)
        assert (ours.calls >= 3) == calls and (ours.calls == 0) != calls


def test_a_wrong_way_is_told_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)

    def upper_left(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal aligned to the first key, as other kernels have it."""
        n = q.shape[2]
        return plain_part(q, k[:, :, :n], v[:, :, :n], True, scale) if causal else plain_part(q, k, v, False, scale)

    q, k = numbers(4, 20, dtype=torch.float16), numbers(2, 30, dtype=torch.float16)
    short = q[:, :, :5]
    ours = PromptAttention(CPU)
    assert ours.ways == ("flash",)
    ours.ways = ("cudnn", "flash")
    monkeypatch.setattr(prompts, "cudnn_part", lambda *given: (_ for _ in ()).throw(RuntimeError("no such plan")))
    assert ours.way(short, k) == "flash"  # shorter than a block: nobody asks
    with pytest.warns(UserWarning, match=r"cudnn fails \(no such plan\)"):
        assert ours.way(q, k) == "flash"
    assert ours.way(q, k) == "flash"  # known: not tried, and not told, again
    monkeypatch.setattr(prompts, "flash_part", upper_left)
    other = PromptAttention(CPU)
    out = torch.full_like(q, float("nan"))
    with pytest.warns(UserWarning, match="flash gives another result"):
        assert not other.attend(q, k, k, out, 1.0)
    assert out.isnan().all()
    assert not ours.attend(q.float(), k.float(), k.float(), out.float(), 1.0)  # 16 bits are these kernels' only types


def test_masks_never_go_where_shapes_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks after others, windows, and one-token sequences of a mixed batch, whose lengths are ever new."""
    monkeypatch.setattr(attention, "batches_decodes", lambda device: True)
    fused = torch.nn.functional.scaled_dot_product_attention
    masks: list[bool] = []

    def watched(*tensors: torch.Tensor, attn_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        if attn_mask is not None:
            masks.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    case = Case([9, 1, 1, 30], [6, 40, 0, 0], (0, 0, 1, 2), 3)
    for window in (None, 8):
        masks.clear()
        case.check(window)
        assert len(masks) > 1 and not any(masks)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
