"""What eager steps of many tokens launch, against plain torch in float32, on random inputs and poisoned outputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import random_weights as rw

from multitensor.kernels import reference
from multitensor.kernels.cache_tensor import QuantCache, make_cache
from multitensor.kernels.cuda.tiles import TiledTensor
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.projection import Projection
from multitensor.parallel.group import SingleGroup

pytestmark = pytest.mark.gpu

HALF, BFLOAT = torch.float16, torch.bfloat16
ROUNDING = {HALF: 1e-3, BFLOAT: 8e-3}
TOKENS = [1, 7, 65, 513]


@pytest.fixture(scope="module")
def kernels() -> Any:
    from multitensor.kernels.cuda.cuda_kernels import CudaKernels

    return CudaKernels(torch.device("cuda:0"), False)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert not found.isnan().any()
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def weight(kernels: Any, name: str, rows: int, cols: int, seed: int) -> tuple[TiledTensor, torch.Tensor]:
    kind = rw.QUANT_TYPES[name]
    planes = rw.slice_of(kind, rw.random_raw(kind, rows, cols, seed, 0.01), 0, cols, "cuda")
    numbers = dequantize(planes)
    return kernels.adopt({"w": planes})["w"], numbers


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("tokens", [65, 513])
@pytest.mark.parametrize("scratch", [1 << 28, 200 * 1024 * 2])  # everything at once; each matrix in parts
@pytest.mark.parametrize("has_bias", [False, True])
def test_products(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int, scratch: int, has_bias: bool
) -> None:
    from multitensor.kernels.cuda import cuda_kernels

    monkeypatch.setattr(cuda_kernels, "EXPAND_BYTES", scratch)
    shapes = [("Q4_K", 520), ("Q6_K", 264), ("Q4_K", 264)]
    weights, numbers = zip(*(weight(kernels, n, rows, 1024, i) for i, (n, rows) in enumerate(shapes)), strict=True)
    biases = [randn(520, seed=8), None, randn(264, seed=9)] if has_bias else [None] * 3
    x = randn(tokens, 1024, dtype=dtype)
    wanted = [
        x.double() @ n.to(dtype).double().T + (0 if b is None else b) for n, b in zip(numbers, biases, strict=True)
    ]
    for found, right in zip(kernels.linears(x, weights, biases), wanted, strict=True):
        assert found.dtype == dtype and error(found, right) < ROUNDING[dtype]
    assert error(kernels.joined_linear(x, weights, biases), torch.cat(wanted, dim=1)) < ROUNDING[dtype]
    assert error(kernels.linear(x, weights[0], biases[0]), wanted[0]) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("hidden", [576, 4096, 16384])
@pytest.mark.parametrize("post", [False, True])
def test_add_rms_norm(kernels: Any, dtype: torch.dtype, tokens: int, hidden: int, post: bool) -> None:
    x, residual = randn(tokens, hidden, dtype=dtype, seed=1), 3 * randn(tokens, hidden, seed=2)
    factor, post_factor = randn(hidden, seed=3), randn(hidden, seed=4) if post else None
    normed, stream = reference.add_rms_norm(x.float(), residual.clone(), factor, 1e-5, 0.0, post_factor)
    group = SingleGroup()
    group.kernels = kernels
    assert kernels.decode_kernels.norm_takes(residual, x, factor, post_factor)
    found, same = group.reduce_add_norm(x, residual, factor, 1e-5, post_factor)
    assert same is residual and found.dtype == dtype
    assert error(residual, stream) < 1e-6 and error(found, normed) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("columns", [8, 768, 14336])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("joined", [False, True])
def test_gated_activation(
    kernels: Any, dtype: torch.dtype, tokens: int, columns: int, kind: Literal["silu", "gelu_tanh"], joined: bool
) -> None:
    both = (2 * randn(tokens, 2 * columns)).to(dtype)
    gate, up = both[:, :columns], both[:, columns:]
    if not joined:
        gate, up = gate.contiguous(), up.contiguous()
    assert kernels.prefill_kernels.gate_takes(gate, up)
    wanted = reference.gated_activation(gate.float(), up.float(), kind)
    found = kernels.gated_activation(gate, up, kind)
    assert found.dtype == dtype and error(found, wanted) < ROUNDING[dtype]
    odd = kernels.gated_activation(gate[:, 1:], up[:, 1:], kind)
    assert error(odd, wanted[:, 1:]) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("size", "kv_type", "style", "rotated", "norms"),
    [
        (128, "f16", "half", 128, False),
        (128, "bf16", "interleaved", 128, True),
        (128, "q8", "interleaved", 128, False),
        (64, "f16", "interleaved", 64, False),
        (64, "q8", "half", 64, True),
        (64, "q4", "half", 32, False),
        (80, "f16", "half", 80, False),
        (256, "f32", "half", 256, True),
    ],
)
def test_projection(
    kernels: Any,
    dtype: torch.dtype,
    tokens: int,
    size: int,
    kv_type: str,
    style: Literal["interleaved", "half"],
    rotated: int,
    norms: bool,
) -> None:
    """Slots in random order, as paged caches and mixed batches have them; the rest of the cache stays as it was."""
    heads = (6, 2, 2)
    made = [weight(kernels, name, h * size, 512, h) for name, h in zip(("Q4_K", "Q4_K", "Q6_K"), heads, strict=True)]
    q_norm, k_norm = (1 + 0.1 * randn(size, seed=i) if norms else None for i in (1, 2))
    projection = Projection((made[0][0], made[1][0], made[2][0]), None, size, style, q_norm, k_norm, 1e-5)
    x, angles = randn(tokens, 512, dtype=dtype, seed=3), randn(tokens, rotated // 2, seed=4)
    blocks = tokens // 16 + 2
    slots = torch.randperm(16 * blocks, generator=torch.Generator().manual_seed(5))[:tokens].cuda()
    found, wanted = ([make_cache(kv_type, (blocks, 16, 2, size), x.device) for _ in "kv"] for _ in range(2))
    assert kernels.prefill_kernels.project_takes(tokens, dtype, projection, angles, *found)
    q = kernels.project(x, projection, angles.cos(), angles.sin(), *found, slots)
    products = [(x.double() @ numbers.double().T).float().unflatten(1, (-1, size)) for _, numbers in made]
    if q_norm is not None and k_norm is not None:
        products[:2] = [reference.rms_norm(y, f, 1e-5) for y, f in ((products[0], q_norm), (products[1], k_norm))]
    queries, keys = (reference.apply_rope(y, angles.cos(), angles.sin(), style) for y in products[:2])
    reference.write_kv(keys, products[2], wanted[0], wanted[1], slots)
    assert q.dtype == dtype and error(q, queries) < 2 * ROUNDING[dtype]
    limit = 2 * ROUNDING[dtype] + {"q8": 0.02, "q4": 0.15, "bf16": ROUNDING[BFLOAT]}.get(kv_type, 0.0)
    for cache, right in zip(found, wanted, strict=True):
        numbers, exact = (c.dequantise() if isinstance(c, QuantCache) else c.float() for c in (cache, right))
        assert error(numbers, exact) < limit
        untouched = torch.ones(16 * blocks, dtype=torch.bool, device=x.device)
        untouched[slots] = False
        assert not numbers.flatten(0, 1)[untouched].any()
