"""Sequences of one new token beside prompts, through their own kernel, against dense float64 attention."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from paged_case import Case

from multitensor.kernels.attention import paged_attention
from multitensor.kernels.cache_tensor import CacheTensor, QuantCache, make_cache
from multitensor.kernels.cuda.cuda_kernels import CudaKernels

pytestmark = pytest.mark.gpu

HALF, BFLOAT = torch.float16, torch.bfloat16
LIMIT = {HALF: 4e-3, BFLOAT: 3e-2}
LENGTHS = [1, 300, 1, 1, 1, 1], [40, 0, 0, 700, 2000, 15]
CROWD = [1] * 70 + [33] + [1] * 5, [(53 * row) % 400 for row in range(76)]


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    return CudaKernels(torch.device("cuda:0"), exact=False)


def quantised(cache: torch.Tensor, kind: Any) -> CacheTensor:
    """The same numbers, rounded; what nobody has written stays poisoned."""
    made = make_cache(kind, tuple(cache.shape), cache.device)
    assert isinstance(made, QuantCache)
    made.scales.fill_(float("nan"))
    flat = cache.flatten(0, 1)
    written = (~flat.isnan()).flatten(1).all(1).nonzero().squeeze(1)
    made.write(flat[written].float(), written)
    return made


@pytest.mark.parametrize(
    ("dtype", "kind", "kv_map", "size", "window", "softcap", "lengths"),
    [
        (HALF, None, (0, 0, 1, 1), 128, None, None, LENGTHS),
        (BFLOAT, None, (0, 0, 1, 1), 64, 100, None, LENGTHS),
        (BFLOAT, None, (0, 1, 0), 128, None, 20.0, LENGTHS),
        (HALF, None, (0, 0), 256, 64, 30.0, LENGTHS),
        (HALF, None, (0, 0, 0, 0), 96, None, None, CROWD),
        (HALF, "q8", (0, 0, 1, 1), 64, None, None, LENGTHS),
        (BFLOAT, "q4", (0, 0, 1), 128, 100, None, CROWD),
    ],
)
def test_a_mixed_step(
    kernels: CudaKernels,
    dtype: torch.dtype,
    kind: Any,
    kv_map: tuple[int, ...],
    size: int,
    window: int | None,
    softcap: float | None,
    lengths: tuple[list[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Queries are some of the columns of a wider matrix, as a projection gives them."""
    case = Case(*lengths, kv_map, max(kv_map) + 1, size, 16, cache_dtype=dtype, dtype=dtype, device="cuda")
    wide = torch.cat([case.q, torch.full_like(case.q[:, :1], float("nan"))], dim=1)
    q = wide[:, : len(kv_map)]
    caches: list[CacheTensor] = [case.k_cache, case.v_cache]
    if kind is not None:
        caches = [quantised(cache, kind) for cache in caches]
    asked = 0
    plain = kernels.singles.attend

    def counted(*arguments: Any, **rules: Any) -> None:
        nonlocal asked
        asked += 1
        plain(*arguments, **rules)

    monkeypatch.setattr(kernels.singles, "attend", counted)
    found = kernels.paged_attention(q, *caches, case.inputs, kv_map, 0.3, window, softcap)
    assert asked == 1
    rows = [start for start, n in zip(case.inputs.query_starts, lengths[0], strict=True) if n == 1]
    if kind is not None:  # against the numbers that the cache has
        back = [cache.dequantise() for cache in caches if isinstance(cache, QuantCache)]
        numbers = paged_attention(q.float(), *back, case.inputs, kv_map, 0.3, window, softcap)
        difference = (found[rows].float() - numbers[rows]).norm() / numbers[rows].norm()
        assert float(difference) <= LIMIT[dtype]
        return
    wanted = case.dense(0.3, window, softcap)
    np.testing.assert_allclose(found.cpu().double().numpy(), wanted, atol=LIMIT[dtype])
