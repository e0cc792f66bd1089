"""The quantised cache of the native CPU kernels: codes as torch writes them, attention over them, on every level."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from native_levels import kernels, poisoned_outputs, random, relative_error

from multitensor.kernels import reference
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import QuantCache, make_cache
from multitensor.kernels.cpu.native import NativeKernels

__all__ = ["kernels", "poisoned_outputs"]  # fixtures

CPU = torch.device("cpu")


def poisoned(kind: Literal["q8", "q4"], *shape: int) -> QuantCache:
    cache = make_cache(kind, shape, CPU)  # type: ignore[arg-type]
    assert isinstance(cache, QuantCache)
    cache.scales.fill_(float("nan"))
    return cache


@pytest.mark.parametrize("kind", ["q8", "q4"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_writes_as_torch_does(kernels: NativeKernels, kind: Literal["q8", "q4"], head_dim: int) -> None:
    k = random(40, 3, head_dim) * torch.logspace(-6, 4, 40).view(-1, 1, 1)
    v = k.flip(0).contiguous()
    k[0], k[1, 0, 3], k[2, 1, 5] = 0.0, 1e30, float("nan")
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:40]
    found, wanted = ([poisoned(kind, 4, 16, 3, head_dim) for _ in range(2)] for _ in range(2))
    kernels.write_kv(k, v, found[0], found[1], slots)
    reference.write_kv(k, v, wanted[0], wanted[1], slots)
    for one, other in zip(found, wanted, strict=True):
        a, b = one.dequantise().flatten(0, 1), other.dequantise().flatten(0, 1)
        assert torch.equal(a.isnan().any(-1), b.isnan().any(-1))
        # Torch adds up a group in another order, so a number near a boundary may fall on its other side.
        assert (one.codes == other.codes).float().mean() > 0.99
        whole = ~b.isnan().any(-1)
        torch.testing.assert_close(one.scales.isnan(), other.scales.isnan())
        error = (a[whole] - b[whole]).norm(dim=-1) / b[whole].norm(dim=-1).clamp(min=1e-6)
        assert float(error.max()) < (0.02 if kind == "q8" else 0.2) and float(error.mean()) < 2e-3
    with pytest.raises(ValueError, match="outside the cache"):
        kernels.write_kv(k, v, found[0], found[1], slots + 64)


@pytest.mark.parametrize("kind", ["q8", "q4"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (20, 4.0)])
def test_attention_is_that_over_the_dequantised_numbers(
    kernels: NativeKernels, kind: Literal["q8", "q4"], head_dim: int, window: int | None, softcap: float | None
) -> None:
    """A mixed batch with a long sequence, whose keys threads share; whatever belongs to nobody is poison."""
    query_lens, context_lens, kv_map = [7, 1, 1, 20, 1], [33, 900, 0, 0, 17], (0, 0, 2, 1, 2)
    tables = np.random.default_rng(0).permutation(300).reshape(5, 60)
    caches = [poisoned(kind, 300, 16, 3, head_dim) for _ in range(2)]
    past = AttentionInputs.build(context_lens, [0] * 5, tables, 16, CPU)
    inputs = AttentionInputs.build(query_lens, context_lens, tables, 16, CPU)
    for seed, step in enumerate((past, inputs)):
        k, v = (random(sum(step.query_lens), 3, head_dim, seed=2 * seed + i) for i in range(2))
        kernels.write_kv(k, v, caches[0], caches[1], step.slot_mapping)
    q = random(sum(query_lens), len(kv_map), head_dim, seed=9)
    floats = [cache.dequantise().double() for cache in caches]
    found = kernels.paged_attention(q, caches[0], caches[1], inputs, kv_map, 0.2, window, softcap)
    wanted = reference.paged_attention(q.double(), floats[0], floats[1], inputs, kv_map, 0.2, window, softcap)
    assert relative_error(found, wanted.double().numpy()) < 1e-5
