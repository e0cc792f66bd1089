"""The quantised cache: layout as documented, rounding, and attention over it against attention over its numbers."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from multitensor.config import KV_GROUP, kv_head_bytes
from multitensor.kernels import attention
from multitensor.kernels.attention import paged_attention, write_kv
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import QuantCache, make_cache

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Kind = Literal["q8", "q4"]
KINDS: list[Kind] = ["q8", "q4"]


def quant_cache(kind: Kind, shape: tuple[int, int, int, int], device: str = "cpu") -> QuantCache:
    cache = make_cache(kind, shape, torch.device(device))
    assert isinstance(cache, QuantCache)
    return cache


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy tails, as keys have; every row of its own size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * x.abs() * 10 ** torch.empty(shape[:-1]).uniform_(-2, 2, generator=generator).unsqueeze(-1)


def written(kind: Kind, x: torch.Tensor, device: str = "cpu") -> QuantCache:
    """x [n, heads, D] in the slots of a cache in order, blocks of 16."""
    cache = quant_cache(kind, (-(-x.shape[0] // 16), 16, *x.shape[1:]), device)
    cache.write(x.to(device), torch.arange(x.shape[0], device=device))
    return cache


def grouped(x: torch.Tensor) -> torch.Tensor:
    """[..., groups, 32], whole groups turned: what is rounded."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % KV_GROUP)).unflatten(-1, (-1, KV_GROUP))
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(32)] for i in range(32)]) * 32**-0.5
    whole = x.shape[-1] // KV_GROUP
    return torch.cat((groups[..., :whole, :] @ matrix, groups[..., whole:, :]), -2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_q8_rounds_to_the_nearest_step(device: str, head_dim: int) -> None:
    x = randn(500, 2, head_dim)
    cache = written("q8", x, device)
    found = cache.read(torch.arange(500, device=device), slice(None), torch.float32).cpu()
    largest = grouped(x).abs().amax(-1, keepdim=True)
    error = (grouped(found) - grouped(x)).abs()
    # Half a step; float16 rounds the step itself, by 2^-11 of it or, where it is subnormal, by 2^-25.
    assert (error <= 0.5 * largest / 127 * (1 + 2**-11) + largest * 2**-10 + 127 * 2**-25).all()
    assert (error.amax(-1) > 0.2 * largest.squeeze(-1) / 127).float().mean() > 0.9  # it did round


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_q4_meets_the_number_of_largest_magnitude(device: str, head_dim: int) -> None:
    x = randn(500, 2, head_dim)
    found = written("q4", x, device).read(torch.arange(500, device=device), slice(None), torch.float32).cpu()
    wanted, groups = grouped(x), grouped(found)
    at = wanted.abs().argmax(-1, keepdim=True)
    extreme = wanted.gather(-1, at)
    subnormal = 8 * 2**-25
    assert ((groups.gather(-1, at) - extreme).abs() <= extreme.abs() * 2**-10 + subnormal).all()
    step = extreme.abs() / 8
    error = (groups - wanted).abs()
    opposite = wanted * extreme.sign() < -7.5 * step  # beyond the last code of the other sign
    bound = torch.where(opposite, 1.0, 0.5) * step
    assert (error <= bound * (1 + 2**-11) + extreme.abs() * 2**-10 + subnormal).all()


@pytest.mark.parametrize("head_dim", [64, 128, 80, 8])
def test_q4_layout_is_the_documented_one(head_dim: int) -> None:
    """Kernels of other languages read it: number by number, from the description alone."""
    x = randn(3, 2, head_dim)
    cache = written("q4", x)
    numbers = grouped(cache.read(torch.arange(3), slice(None), torch.float32)).flatten(-2)
    codes = cache.codes.flatten(0, 1)
    for token, head, dim in np.ndindex(3, 2, head_dim):
        word, place = divmod(dim, 8)
        if head_dim % 64 == 0:
            word = word // 8 * 8 + [0, 4, 1, 5, 2, 6, 3, 7].index(word % 8)
        nibble = place // 2 + 4 * (place % 2)
        byte = int(codes[token, head, 4 * word + nibble // 2])
        code = (byte >> 4 * (nibble % 2) & 15) - 8
        scale = float(cache.scales[0, head, token, dim // KV_GROUP])
        assert code * scale == pytest.approx(float(numbers[token, head, dim]), abs=1e-5 * abs(scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_bytes_are_those_of_the_plan(kind: Kind, head_dim: int) -> None:
    assert quant_cache(kind, (5, 16, 3, head_dim)).nbytes == 5 * 16 * 3 * kv_head_bytes(kind, head_dim)
    assert kv_head_bytes("q8", 128) == 4 * 34 and kv_head_bytes("q4", 128) == 4 * 18


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_slots_named_are_written(kind: Kind) -> None:
    cache = quant_cache(kind, (4, 16, 2, 64))
    slots = torch.tensor([17, 3, 40])
    cache.write(randn(3, 2, 64), slots)
    touched = cache.dequantise().flatten(0, 1).abs().sum((1, 2)) > 0
    assert touched.nonzero().flatten().tolist() == [3, 17, 40]
    cache.write(torch.zeros(3, 2, 64), slots)
    assert (cache.dequantise() == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_stay_none_and_huge_ones_finite(kind: Kind) -> None:
    x = randn(3, 1, 64)
    x[0, 0, 5], x[1], x[2] = float("nan"), 0.0, 1e-12
    x[1, 0, 5] = 1e30
    numbers = written(kind, x).dequantise().flatten(0, 1)
    assert numbers[0, 0, :32].isnan().any() and numbers[0, 0, 32:].isfinite().all()
    assert numbers[1].isfinite().all() and numbers[1, 0, 5] == pytest.approx(65504, rel=0.1)
    assert (numbers[2] == 0).all()


def test_q4_of_heads_that_are_not_in_eights_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        make_cache("q4", (1, 16, 1, 20), CPU)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 4.0), (20, 4.0)])
def test_attention_is_that_over_the_dequantised_numbers(
    device: str,
    kind: Kind,
    head_dim: int,
    batched: bool,
    window: int | None,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mixed batch of five, written in two steps; whatever belongs to nobody is poison."""
    if batched:
        monkeypatch.setattr(attention, "batches_decodes", lambda device: True)
    monkeypatch.setattr(attention, "GATHER_BYTES", 100_000)  # one head, a few sequences at a time
    query_lens, context_lens, kv_map = [7, 1, 1, 20, 1], [33, 60, 0, 0, 17], (0, 0, 2, 1, 2)
    lengths = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
    tables = np.full((5, 5), 25)
    tables.flat[:] = np.random.default_rng(0).permutation(25)
    caches = [quant_cache(kind, (26, 16, 3, head_dim), device) for _ in range(2)]
    for cache in caches:
        cache.scales.fill_(float("nan"))
    past = AttentionInputs.build(context_lens, [0] * 5, tables, 16, torch.device(device))
    inputs = AttentionInputs.build(query_lens, context_lens, tables, 16, torch.device(device))
    for seed, step in enumerate((past, inputs)):
        k, v = (randn(sum(step.query_lens), 3, head_dim, seed=2 * seed + i).to(device) for i in range(2))
        write_kv(k, v, caches[0], caches[1], step.slot_mapping)
    q = torch.randn(sum(query_lens), len(kv_map), head_dim, generator=torch.Generator().manual_seed(9)).to(device)
    floats = [cache.dequantise() for cache in caches]
    assert sum(int((~cache[..., 0, 0].isnan()).sum()) for cache in floats) == 2 * sum(lengths)
    found = paged_attention(q, caches[0], caches[1], inputs, kv_map, 0.05, window, softcap)
    wanted = paged_attention(q, floats[0], floats[1], inputs, kv_map, 0.05, window, softcap)
    assert found.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpus_products_of_halves(kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on the CPU: numbers dequantised to the activations' type."""
    monkeypatch.setattr(attention, "batches_decodes", lambda device: True)
    monkeypatch.setattr(attention, "working_dtype", lambda q, k_cache, softcap: q.dtype)
    inputs = AttentionInputs.build([9, 1], [6, 40], np.arange(8).reshape(2, 4), 16, CPU)
    caches = [quant_cache(kind, (8, 16, 2, 64)) for _ in range(2)]
    for seed, cache in enumerate(caches):
        cache.write(torch.randn(128, 2, 64, generator=torch.Generator().manual_seed(seed)), torch.arange(128))
    q = torch.randn(10, 4, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = paged_attention(q, caches[0], caches[1], inputs, (0, 0, 1, 1), 0.3)
    floats = [cache.dequantise().to(dtype) for cache in caches]
    wanted = paged_attention(q, floats[0], floats[1], inputs, (0, 0, 1, 1), 0.3).float()
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=1e-6)
