"""Attention of a decode step over the paged cache (decode.cu), with and without rotary embedding and cache write in the
same launch, on an emulated GPU against the plain kernels. Kernel, defines and arguments are those that a GPU gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulated_cuda
import numpy as np
import pytest
import torch

from multitensor.kernels import reference
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor, QuantCache, make_cache
from multitensor.kernels.cuda import decode
from multitensor.kernels.cuda.decode import DecodeAttention, DecodeKernels, cache_kind

pytestmark = pytest.mark.skipif(emulated_cuda.compiler() is None, reason="there is no C++ compiler")
CPU = torch.device("cpu")
BLOCK = 16

# head_dim, query -> KV head, cache, activations, window, soft-cap
CASES = {
    "float16": (64, [0, 0, 0, 1, 1], "f16", torch.float16, None, None),
    "bfloat16, window, soft-cap": (96, [0, 1, 1], "bf16", torch.bfloat16, 40, 20.0),
    "float32 cache": (64, [0, 0], "f32", torch.float16, None, None),
    "8 bits": (128, [0, 0, 1], "q8", torch.float16, None, None),
    "4 bits, window": (64, [0, 1, 1], "q4", torch.bfloat16, 70, None),
}
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> emulated_cuda.Queue:
    made = emulated_cuda.Queue(tmp_path)
    emulated_cuda.replace_gpu(monkeypatch, made, decode, processors=4)
    return made


def numbers_of(cache: CacheTensor) -> torch.Tensor:
    """float32 [slots, heads, head_dim]"""
    return (cache.dequantise() if isinstance(cache, QuantCache) else cache.float()).flatten(0, 1)


class Batch:
    """Sequences whose cache holds the keys before the new token's; one of them is padding."""

    def __init__(self, positions: list[int], kv_heads: int, head_dim: int, kv_type: str) -> None:
        random = np.random.default_rng(1)
        width = max(positions) // BLOCK + 1
        self.tables = random.permutation(len(positions) * width).reshape(len(positions), width).astype(np.int32)
        shape = (len(positions) * width, BLOCK, kv_heads, head_dim)
        self.keys, self.values = (make_cache(kv_type, shape, CPU) for _ in range(2))
        for cache in (self.keys, self.values):  # what nobody has written must not be read
            (cache.scales if isinstance(cache, QuantCache) else cache).fill_(float("nan"))
        generator = torch.Generator().manual_seed(2)
        for row, position in enumerate(positions):
            place = np.arange(max(position, 0))
            slots = torch.from_numpy(self.tables[row, place // BLOCK].astype(np.int64) * BLOCK + place % BLOCK)
            k, v = torch.randn(2, len(place), kv_heads, head_dim, generator=generator)
            reference.write_kv(k, v, self.keys, self.values, slots)
        self.positions = positions
        at = [max(position, 0) for position in positions]
        self.slots = torch.tensor([self.tables[row, p // BLOCK] * BLOCK + p % BLOCK for row, p in enumerate(at)])

    def attention(self, q: torch.Tensor, kv_map: list[int], **rules: Any) -> torch.Tensor:
        """float32 [live sequences, heads, head_dim], of what the cache holds now."""
        live = [row for row, position in enumerate(self.positions) if position >= 0]
        contexts = [self.positions[row] for row in live]
        inputs = AttentionInputs.build([1] * len(live), contexts, self.tables[live], BLOCK, CPU)
        keys, values = (numbers_of(cache).unflatten(0, (-1, BLOCK)) for cache in (self.keys, self.values))
        return reference.paged_attention(q[live].float(), keys, values, inputs, kv_map, **rules)


@pytest.mark.parametrize("name", CASES)
def test_rotary_cache_write_and_attention_in_one_launch(name: str, queue: emulated_cuda.Queue) -> None:
    """Against the cache that rope_write_kv writes, and attention over it with the queries that it turns."""
    head_dim, kv_map, kv_type, dtype, window, softcap = CASES[name]
    kv_heads, positions = max(kv_map) + 1, [3, 150, -1, 0, 33]
    batch = Batch(positions, kv_heads, head_dim, kv_type)
    scale = 2.0 * head_dim**-0.5
    rules: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    kind = cache_kind(batch.keys)
    shape = (kv_map, kv_heads, head_dim, dtype, kind, BLOCK, len(positions))
    attention = DecodeAttention(DecodeKernels(CPU), *shape, **rules, min_keys=32)  # so that the long one is cut
    generator = torch.Generator().manual_seed(3)
    heads = len(kv_map)
    qkv = torch.randn(len(positions), (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    angle = torch.rand(max(positions) + 1, head_dim // 2, generator=generator)
    rope = (batch.slots, angle.cos(), angle.sin())
    at, tables = torch.tensor(positions, dtype=torch.int32), torch.from_numpy(batch.tables)
    out = torch.full((len(positions), heads * head_dim), float("nan"), dtype=dtype)
    attention.rope_attend(qkv, batch.keys, batch.values, at, tables, *rope, out, style="half")
    assert queue.run(1, seed=4)
    turned = qkv.clone()
    written = Batch(positions, kv_heads, head_dim, kv_type)
    attention.rope_write_kv(turned, written.keys, written.values, at, *rope, style="half")
    assert queue.run(1, seed=5)
    assert torch.equal(numbers_of(batch.keys).nan_to_num(), numbers_of(written.keys).nan_to_num())
    assert torch.equal(numbers_of(batch.values).nan_to_num(), numbers_of(written.values).nan_to_num())
    check_rotation(qkv, turned, angle, positions, heads, head_dim)
    q = turned[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    wanted = batch.attention(q, kv_map, **rules)
    live = [row for row, position in enumerate(positions) if position >= 0]
    found = out[live].unflatten(1, (heads, head_dim)).float()
    assert float((found - wanted).norm() / wanted.norm()) < ROUNDING[dtype]
    again = torch.full_like(out, float("nan"))
    attention.attend(turned, batch.keys, batch.values, at, tables, again)
    assert queue.run(1, seed=6)
    assert float((again[live].float() - wanted.flatten(1)).norm() / wanted.norm()) < ROUNDING[dtype]


def check_rotation(
    qkv: torch.Tensor, turned: torch.Tensor, angle: torch.Tensor, positions: list[int], heads: int, head_dim: int
) -> None:
    """Of the queries, in halves; padding stays as it was."""
    half = head_dim // 2
    for row, position in enumerate(positions):
        before = qkv[row, : heads * head_dim].view(heads, head_dim).float()
        after = turned[row, : heads * head_dim].view(heads, head_dim)
        if position < 0:
            assert torch.equal(after.float(), before)
            continue
        c, s = angle[position].cos(), angle[position].sin()
        first, second = before[:, :half], before[:, half:]
        wanted = torch.cat((first * c - second * s, second * c + first * s), dim=1)
        assert torch.allclose(after.float(), wanted, rtol=1e-2, atol=1e-2)


LENGTHS = {
    "alike": ([40, 47, 33, 40, 41], None),
    "one is long": ([3, 600, 0, 17, 30, 16, 15], None),
    "one is long, a window": ([3, 600, 0, 17, 30, 500, 15], 100),
    "more than fill the GPU": ([90, 5, -1, 64] * 5 + [333], None),
    "more than a warp has lanes": ([20 + 7 * row % 50 for row in range(36)] + [-1, 400], None),
    "alone": ([700], None),
}


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("name", LENGTHS)
def test_any_lengths_beside_each_other(name: str, warps: int, queue: emulated_cuda.Queue) -> None:
    """Each sequence gets what it would get alone, in its own rows, and no other row is touched; scratch and
    counters serve for the next launch."""
    positions, window = LENGTHS[name]
    kv_map, kv_heads, head_dim, count = [0, 0, 1], 2, 64, len(positions)
    batch = Batch(positions, kv_heads, head_dim, "f16")
    generator = torch.Generator().manual_seed(5)
    for cache in (batch.keys, batch.values):  # the new tokens', that their projection has written
        new = torch.randn(count, kv_heads, head_dim, generator=generator)
        live = torch.tensor(positions) >= 0
        cache.flatten(0, 1)[batch.slots[live]] = new[live].to(cache.dtype)  # type: ignore[union-attr]
    shape = (kv_map, kv_heads, head_dim, torch.float16, torch.float16, BLOCK, count)
    attention = DecodeAttention(DecodeKernels(CPU), *shape, scale=0.2, window=window, min_keys=32, warps=warps)
    attention._partials.fill_(float("nan"))
    attention._stats.fill_(float("nan"))
    rows = torch.randperm(count + 3, generator=generator)[:count]
    q = torch.randn(count + 3, len(kv_map), head_dim, generator=generator).half()
    at, tables = torch.tensor(positions, dtype=torch.int32), torch.from_numpy(batch.tables)
    wanted = batch.attention(q[rows], kv_map, scale=0.2, window=window)
    live_rows = rows[at >= 0]
    for seed in range(2):
        out = torch.full((count + 3, len(kv_map) * head_dim), 7.0, dtype=torch.float16)
        arguments = (q.flatten(1), batch.keys, batch.values, at, tables, out)
        attention.attend(*arguments, rows=rows.to(torch.int32))
        assert queue.run(1, seed=seed)
        found = out[live_rows].unflatten(1, (len(kv_map), head_dim)).float()
        errors = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        assert float(errors.max()) < ROUNDING[torch.float16]
        assert (out[rows[at < 0]] == 0).all()
        others = [row for row in range(count + 3) if row not in rows.tolist()]
        assert (out[others] == 7).all()
