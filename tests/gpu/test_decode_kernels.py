"""The decode step's small kernels against the plain torch ones in float32, on random inputs and poisoned outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from multitensor.kernels import reference
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor, QuantCache, make_cache

pytestmark = pytest.mark.gpu

# Relative errors: of one rounding to the type, times two or three.
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
KVType = torch.dtype | Literal["q8", "q4"]
# A quantised cache is compared by its numbers; queries, numbers and weights are rounded to float16.
ROUNDING: dict[KVType, float] = {HALF: 1e-3, BFLOAT: 5e-3, FLOAT: 2e-5, "q8": 2e-3, "q4": 2e-3}


@pytest.fixture(scope="module")
def kernels() -> Any:
    from multitensor.kernels.cuda.decode import DecodeKernels

    return DecodeKernels(torch.device("cuda:0"))


def randn(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def poison(*shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def poisoned_cache(kv_type: KVType, *shape: int) -> CacheTensor:
    if isinstance(kv_type, torch.dtype):
        return poison(*shape, dtype=kv_type)
    cache = make_cache(kv_type, shape, torch.device("cuda"))  # type: ignore[arg-type]
    assert isinstance(cache, QuantCache)
    cache.scales.fill_(float("nan"))
    return cache


def numbers_of(cache: CacheTensor) -> torch.Tensor:
    """float32 [slots, heads, D]"""
    return (cache.dequantise() if isinstance(cache, QuantCache) else cache.float()).flatten(0, 1)


def cloned(cache: CacheTensor) -> CacheTensor:
    if isinstance(cache, QuantCache):
        return replace(cache, codes=cache.codes.clone(), scales=cache.scales.clone())
    return cache.clone()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert not found.isnan().any()
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def same_codes(one: QuantCache, other: QuantCache, slots: torch.Tensor) -> bool:
    """Of some slots, but for one number in fifty that differs by a rounding."""
    found, wanted = numbers_of(one)[slots], numbers_of(other)[slots]
    assert not found.isnan().any()
    codes = (one.codes.flatten(0, 1)[slots] == other.codes.flatten(0, 1)[slots]).float().mean()
    return bool(codes >= 0.98) and relative_error(found, wanted) <= 2e-2


def int32(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.int32, device="cuda")


class Paged:
    """A poisoned cache in which only the slots of the sequences' visible keys hold numbers; blocks in random order."""

    def __init__(
        self,
        positions: list[int],
        kv_heads: int,
        head_dim: int,
        block_size: int,
        kv_type: KVType,
        window: int | None,
    ) -> None:
        lengths = [position + 1 for position in positions]
        blocks = [-(-length // block_size) for length in lengths]
        order = np.random.default_rng(1).permutation(sum(blocks) + 1)
        width = max(blocks) + 2
        self.tables = np.full((len(positions), width), order[-1])  # the last block is nobody's
        shape = (sum(blocks) + 1, block_size, kv_heads, head_dim)
        self.keys, self.values = poisoned_cache(kv_type, *shape), poisoned_cache(kv_type, *shape)
        used = 0
        for row, (count, length) in enumerate(zip(blocks, lengths, strict=True)):
            self.tables[row, :count] = order[used : used + count]
            used += count
            place = np.arange(0 if window is None else max(0, length - window), length)
            slots = torch.from_numpy(self.tables[row, place // block_size] * block_size + place % block_size).cuda()
            k, v = (randn(len(place), kv_heads, head_dim, seed=2 * row + i + 10) for i in range(2))
            reference.write_kv(k, v, self.keys, self.values, slots)
        self.positions, self.block_size = positions, block_size

    def attention(
        self, q: torch.Tensor, kv_map: list[int], scale: float, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        """Of the sequences that are not padding, in float32."""
        live = [row for row, position in enumerate(self.positions) if position >= 0]
        contexts = [self.positions[row] for row in live]
        inputs = AttentionInputs.build([1] * len(live), contexts, self.tables[live], self.block_size, q.device)
        wanted = torch.zeros(q.shape, dtype=FLOAT, device="cuda")
        keys, values = (numbers_of(cache).view(self.keys.shape) for cache in (self.keys, self.values))
        wanted[live] = reference.paged_attention(q[live].float(), keys, values, inputs, kv_map, scale, window, softcap)
        return wanted


MIXED = [0, 15, 16, -1, 300, 1023, 5000]
LLAMA = [head // 8 for head in range(16)]
MANY = [(37 * row * row) % 700 + (7000 if row % 21 == 5 else 0) for row in range(60)] + [-1] * 4


@pytest.mark.parametrize(
    ("head_dim", "kv_map", "positions", "dtype", "kv_dtype", "window", "softcap"),
    [
        (128, LLAMA, MIXED, HALF, HALF, None, None),
        (128, LLAMA, MIXED, BFLOAT, BFLOAT, None, None),
        (128, LLAMA, MIXED, BFLOAT, FLOAT, 700, 30.0),
        (128, LLAMA, [40000], HALF, HALF, None, None),
        (128, LLAMA, [255], HALF, HALF, None, None),
        (128, LLAMA, [40000, 3, 20000, 900] * 2, HALF, HALF, None, None),
        (128, LLAMA, [5000] * 3, HALF, HALF, 1024, None),
        (128, LLAMA, [900, -1] * 32, HALF, HALF, None, None),
        (128, LLAMA, MANY, BFLOAT, BFLOAT, None, None),
        (128, LLAMA, MANY, HALF, "q4", 300, None),
        (128, [0] * 16 + [1] * 3, MIXED, HALF, HALF, None, None),
        (128, [0] * 11, [9000], BFLOAT, BFLOAT, 4000, None),
        (64, [0, 0, 0, 1, 1, 1, 2, 2, 2], MIXED, BFLOAT, BFLOAT, 100, None),
        (64, [1, 0, 1, 1, 2], MIXED, BFLOAT, HALF, None, None),
        (80, [0, 1, 2], MIXED, HALF, HALF, None, 20.0),
        (80, [0, 1, 2], MIXED, HALF, FLOAT, None, None),
        (96, [0, 0, 1, 1], MIXED, HALF, HALF, 17, None),
        (256, [0] * 4, MIXED, BFLOAT, BFLOAT, 512, 50.0),
        (256, [0] * 4, [70000], BFLOAT, BFLOAT, None, None),
        (256, [0] * 9, MIXED, HALF, HALF, None, None),
        (256, [0, 0], MIXED, HALF, FLOAT, None, None),
        (128, LLAMA, MIXED, HALF, "q8", None, None),
        (128, LLAMA, MIXED, HALF, "q4", None, None),
        (128, LLAMA, [40000], BFLOAT, "q8", None, None),
        (128, LLAMA, [130000], HALF, "q4", None, None),
        (128, LLAMA, [40000, 3, 20000, 900] * 2, HALF, "q8", None, None),
        (128, [0] * 16 + [1] * 3, MIXED, HALF, "q8", None, None),
        (128, [0] * 11, [9000], BFLOAT, "q4", 4000, None),
        (64, [0, 0, 0, 1, 1, 1, 2, 2, 2], MIXED, BFLOAT, "q8", 100, None),
        (64, [1, 0, 1, 1, 2], MIXED, HALF, "q4", None, None),
        (96, [0, 0, 1, 1], MIXED, HALF, "q8", 17, 20.0),
        (96, [0, 0, 1, 1], MIXED, HALF, "q4", None, None),
        (256, [0] * 4, MIXED, BFLOAT, "q8", 512, 50.0),
        (256, [0] * 4, MIXED, HALF, "q4", None, None),
    ],
)
@pytest.mark.parametrize("warps", [4, 8, 16])
def test_attention(
    kernels: Any,
    head_dim: int,
    kv_map: list[int],
    positions: list[int],
    dtype: torch.dtype,
    kv_dtype: KVType,
    window: int | None,
    softcap: float | None,
    warps: int,
) -> None:
    if warps == 16 and (head_dim > 128 or max(map(kv_map.count, kv_map)) > 8):
        pytest.skip("too much shared memory")
    from multitensor.kernels.cuda.decode import DecodeAttention

    kv_heads, sequences, heads = max(kv_map) + 1, len(positions), len(kv_map)
    scale = 2.0 * head_dim**-0.5  # sharper than usual, so that wrong maxima would show
    block_size = 32 if head_dim == 80 else 16
    paged = Paged(positions, kv_heads, head_dim, block_size, kv_dtype, window)
    attention = DecodeAttention(
        kernels,
        kv_map,
        kv_heads,
        head_dim,
        dtype,
        kv_dtype,
        block_size,
        sequences,
        scale=scale,
        window=window,
        softcap=softcap,
        warps=warps,
    )
    attention._partials.fill_(float("nan"))
    attention._stats.fill_(float("nan"))
    row = (heads + 2 * kv_heads) * head_dim
    qkv = randn(sequences, row, dtype=dtype, seed=3)
    tables, at = int32(paged.tables), int32(positions)
    q = qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    wanted = paged.attention(q, kv_map, scale, window, softcap)
    results = []
    for _ in range(2):  # the second call finds the counters as the first left them
        out = poison(sequences, heads * head_dim, dtype=dtype)
        attention.attend(qkv, paged.keys, paged.values, at, tables, out)
        results.append(out)
    torch.cuda.synchronize()
    found = results[0].view(sequences, heads, head_dim)
    assert torch.equal(results[0], results[1])
    for sequence, position in enumerate(positions):
        if position < 0:
            assert (found[sequence] == 0).all()
        else:
            error = relative_error(found[sequence], wanted[sequence])
            assert error <= max(ROUNDING[dtype], ROUNDING[kv_dtype]), (sequence, position, error)


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize(
    ("head_dim", "rotary", "dtype", "kv_dtype", "normed", "biased"),
    [
        (64, 64, HALF, HALF, False, False),
        (80, 32, BFLOAT, HALF, True, True),
        (96, 96, HALF, FLOAT, True, False),
        (128, 128, BFLOAT, BFLOAT, False, True),
        (128, 64, HALF, HALF, True, False),
        (256, 256, BFLOAT, BFLOAT, True, False),
        (64, 64, HALF, "q8", False, False),
        (64, 64, BFLOAT, "q4", True, True),
        (96, 96, HALF, "q4", False, False),
        (128, 64, HALF, "q8", True, False),
        (128, 128, BFLOAT, "q4", False, True),
        (256, 256, BFLOAT, "q8", True, False),
    ],
)
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_rope_write_kv(
    kernels: Any,
    style: Literal["interleaved", "half"],
    head_dim: int,
    rotary: int,
    dtype: torch.dtype,
    kv_dtype: KVType,
    normed: bool,
    biased: bool,
    slot_dtype: torch.dtype,
) -> None:
    from multitensor.kernels.cuda.decode import DecodeAttention

    kv_map, kv_heads, positions, slots = [0, 0, 0, 1, 1], 2, [0, 511, -1, 77], [35, 2, 0, 50]
    heads = len(kv_map)
    attention = DecodeAttention(kernels, kv_map, kv_heads, head_dim, dtype, kv_dtype, 16, 4, scale=1.0)
    qkv = randn(4, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    bias = randn(qkv.shape[1], seed=1) if biased else None
    q_norm, k_norm = (randn(head_dim, seed=2), randn(head_dim, seed=3)) if normed else (None, None)
    angles = randn(512, rotary // 2, seed=4)
    cosines, sines = 1.1 * angles.cos(), 1.1 * angles.sin()
    keys, values = (poisoned_cache(kv_dtype, 4, 16, kv_heads, head_dim) for _ in range(2))

    x = qkv.float() if bias is None else qkv.float() + bias
    q, k, v = x.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = reference.rms_norm(q, q_norm, 1e-5), reference.rms_norm(k, k_norm, 1e-5)
    at = torch.tensor(positions, device="cuda").clamp(min=0)
    q, k = (reference.apply_rope(part, cosines[at], sines[at], style) for part in (q, k))

    changed = qkv.clone()
    mapping = torch.tensor(slots, dtype=slot_dtype, device="cuda")
    attention.rope_write_kv(
        changed,
        keys,
        values,
        int32(positions),
        mapping,
        cosines,
        sines,
        style=style,
        bias=bias,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=1e-5,
    )
    torch.cuda.synchronize()
    live = [0, 1, 3]
    found = changed.unflatten(1, (-1, head_dim))
    assert relative_error(found[live][:, :heads], q[live]) <= ROUNDING[dtype] / 2
    assert torch.equal(changed[2], qkv[2])
    for cache, wanted in ((keys, k), (values, v)):
        flat = numbers_of(cache)
        written = [slots[row] for row in live]
        if isinstance(cache, QuantCache):
            other = poisoned_cache(kv_dtype, 4, 16, kv_heads, head_dim)
            assert isinstance(other, QuantCache)
            other.write(wanted[live].contiguous(), mapping[live].long())
            # Sums are taken in another order, so a number near a boundary may fall on its other side.
            assert same_codes(cache, other, mapping[live].long())
        else:
            assert relative_error(flat[written], wanted[live]) <= ROUNDING[kv_dtype] / 2
        others = [slot for slot in range(flat.shape[0]) if slot not in written]
        assert flat[others].isnan().all()


@pytest.mark.parametrize("hidden", [576, 4096, 8192, 16384])
@pytest.mark.parametrize(("dtype", "partial_dtype"), [(HALF, FLOAT), (BFLOAT, BFLOAT)])
@pytest.mark.parametrize("mode", ["plain", "post", "first"])
def test_add_rms_norm(kernels: Any, hidden: int, dtype: torch.dtype, partial_dtype: torch.dtype, mode: str) -> None:
    residual, partial = randn(5, hidden, seed=1), randn(5, hidden, dtype=partial_dtype, seed=2)
    weight, post = randn(hidden, seed=3), randn(hidden, seed=4)
    wanted = residual.clone()
    if mode != "first":
        wanted += reference.rms_norm(partial.float(), post, 1e-3, 1.0) if mode == "post" else partial
    normed = reference.rms_norm(wanted, weight, 1e-3, 1.0)
    out = poison(5, hidden, dtype=dtype)
    given = None if mode == "first" else partial
    post_weight = post if mode == "post" else None
    kernels.add_rms_norm(residual, given, weight, 1e-3, out, post_weight=post_weight, offset=1.0)
    torch.cuda.synchronize()
    assert relative_error(residual, wanted) <= 1e-6
    assert relative_error(out, normed) <= ROUNDING[dtype] / 2


@pytest.mark.parametrize(
    ("head_dim", "kv_map", "dtype", "kv_dtype", "normed"),
    [
        (128, [head // 8 for head in range(16)], HALF, HALF, False),
        (128, [0] * 12 + [1] * 3, BFLOAT, BFLOAT, True),
        (80, [0, 1, 0], HALF, FLOAT, True),
        (256, [0] * 4, BFLOAT, HALF, False),
        (128, [head // 8 for head in range(16)], HALF, "q8", False),
        (128, [0] * 12 + [1] * 3, BFLOAT, "q4", True),
        (64, [0, 1, 0], HALF, "q4", True),
        (96, [0, 1, 0], HALF, "q8", False),
        (256, [0] * 4, BFLOAT, "q8", False),
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_rope_and_attention_in_one_launch(
    kernels: Any, head_dim: int, kv_map: list[int], dtype: torch.dtype, kv_dtype: KVType, normed: bool, early: bool
) -> None:
    """The same as in two launches: bit for bit where the cache's type is the activations' own."""
    from multitensor.kernels.cuda.decode import DecodeAttention

    positions, kv_heads, heads = [0, 16, 31, -1, 128, 2000], max(kv_map) + 1, len(kv_map)
    paged = Paged(positions, kv_heads, head_dim, 16, kv_dtype, None)
    slots = [table[p // 16] * 16 + p % 16 if p >= 0 else 0 for p, table in zip(positions, paged.tables, strict=True)]
    mapping = torch.tensor(slots, dtype=torch.int64, device="cuda")
    live = [row for row, position in enumerate(positions) if position >= 0]
    nothing = poison(len(live), kv_heads, head_dim)
    reference.write_kv(nothing, nothing, paged.keys, paged.values, mapping[live])
    attention = DecodeAttention(
        kernels, kv_map, kv_heads, head_dim, dtype, kv_dtype, 16, 8, scale=head_dim**-0.5, early=early
    )
    qkv = randn(len(positions), (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = randn(2001, head_dim // 2, seed=4)
    cosines, sines, at, tables = angles.cos(), angles.sin(), int32(positions), int32(paged.tables)
    norms: dict[str, Any] = (
        {"q_norm": randn(head_dim, seed=2), "k_norm": randn(head_dim, seed=3), "eps": 1e-6} if normed else {}
    )
    caches = [(cloned(paged.keys), cloned(paged.values)) for _ in range(2)]
    outs = [poison(len(positions), heads * head_dim, dtype=dtype) for _ in range(2)]
    torch.cuda.synchronize()
    attention.rope_attend(qkv, *caches[0], at, tables, mapping, cosines, sines, outs[0], style="interleaved", **norms)
    torch.cuda.synchronize()
    attention.rope_write_kv(qkv, *caches[1], at, mapping, cosines, sines, style="interleaved", **norms)
    attention.attend(qkv, *caches[1], at, tables, outs[1])
    torch.cuda.synchronize()
    for one, two in zip(*caches, strict=True):
        if isinstance(one, QuantCache) and isinstance(two, QuantCache):
            assert same_codes(one, two, mapping[live])
        else:
            assert torch.equal(numbers_of(one)[mapping[live]], numbers_of(two)[mapping[live]])
        assert torch.equal(numbers_of(one).isnan(), numbers_of(two).isnan())
    assert (outs[0][3] == 0).all()
    if dtype == kv_dtype:
        assert torch.equal(*outs)
    else:
        assert relative_error(*outs) <= (ROUNDING[dtype] if isinstance(kv_dtype, torch.dtype) else 1e-2)


@pytest.mark.parametrize("kv_type", [HALF, "q8", "q4"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_captured_step_follows_the_positions(kernels: Any, fused: bool, kv_type: KVType) -> None:
    """Rope, cache writes and attention in one CUDA graph, overlapped; replayed for token after token."""
    from multitensor.kernels.cuda.decode import DecodeAttention

    kv_map, kv_heads, head_dim, block_size, steps = [0, 0, 1, 1], 2, 64, 16, 40
    attention = DecodeAttention(
        kernels, kv_map, kv_heads, head_dim, HALF, kv_type, block_size, 2, scale=0.125, min_keys=16
    )
    angles = randn(steps, head_dim // 2, seed=4)
    cosines, sines = angles.cos(), angles.sin()
    keys, values = (poisoned_cache(kv_type, 8, block_size, kv_heads, head_dim) for _ in range(2))
    tables = int32([[3, 1, 7], [0, 6, 2]])
    positions, slots = int32([0, 0]), torch.zeros(2, dtype=torch.int64, device="cuda")
    qkv, out = randn(2, 8 * head_dim, dtype=HALF), poison(2, 4 * head_dim, dtype=HALF)

    def step() -> None:
        if fused:
            attention.rope_attend(qkv, keys, values, positions, tables, slots, cosines, sines, out, style="half")
            return
        attention.rope_write_kv(qkv, keys, values, positions, slots, cosines, sines, style="half")
        attention.attend(qkv, keys, values, positions, tables, out)

    slots.copy_(tables[:, 0] * block_size)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number in range(steps):
        at = [number, max(0, number - 5)]
        positions.copy_(int32(at))
        slots.copy_(torch.stack([tables[s, p // block_size] * block_size + p % block_size for s, p in enumerate(at)]))
        fresh = randn(2, 8 * head_dim, dtype=HALF, seed=number)
        qkv.copy_(fresh)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        inputs = AttentionInputs.build([1, 1], at, tables.cpu().numpy(), block_size, qkv.device)
        q = reference.apply_rope(fresh[:, : 4 * head_dim].view(2, 4, head_dim).float(), cosines[at], sines[at], "half")
        floats = [numbers_of(cache).view(keys.shape) for cache in (keys, values)]
        wanted = reference.paged_attention(q, floats[0], floats[1], inputs, kv_map, 0.125)
        assert relative_error(out, wanted.flatten(1)) <= 2 * ROUNDING[kv_type]
