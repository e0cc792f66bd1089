"""How the CUDA kernels' Python side computes many tokens, with plain torch in the place of what needs a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from random_weights import random_tensor

from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels import reference
from multitensor.kernels.cache_tensor import QuantCache, make_cache
from multitensor.kernels.cuda import cuda_kernels
from multitensor.kernels.cuda.cuda_kernels import CudaKernels
from multitensor.kernels.cuda.decode import DecodeKernels
from multitensor.kernels.cuda.float_matrix import FloatKernels
from multitensor.kernels.cuda.matrix import TileKernels
from multitensor.kernels.cuda.prefill import PrefillKernels
from multitensor.kernels.cuda.tiles import ROWS, TiledTensor, to_tiles
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.projection import Projection
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.rows import Rows
from multitensor.kernels.torch_kernels import Kernels
from multitensor.parallel.group import SingleGroup

HALF = torch.float16
TOKENS = 70  # more than any kernel for few tokens takes


class PlainTiles(TileKernels):
    """Expands by the planes' own numbers."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.planes: dict[int, QuantTensor] = {}
        self.expansions = 0

    def tiled(self, name: str, rows: int, cols: int, seed: int) -> TiledTensor:
        planes, _ = random_tensor(name, rows, cols, seed)
        tiled = to_tiles(planes, lambda _, chosen: dequantize(planes, chosen))
        self.planes[tiled.tiles.data_ptr()] = planes
        return tiled

    def takes(self, weights: Any, tokens: int) -> bool:
        return False

    def _expand(
        self, w: TiledTensor, out: torch.Tensor, first: int, groups: int, rows: int, ids: torch.Tensor | None
    ) -> None:
        assert (
            ids is None and out.is_contiguous() and groups == -(-len(out) // ROWS) and rows == first * ROWS + len(out)
        )
        self.expansions += 1
        out.copy_(dequantize(self.planes[w.tiles.data_ptr()], slice(first * ROWS, rows)))


class PlainPrefill(PrefillKernels):
    """Says what the kernels would be asked for, and does it in plain torch."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def rope_write_kv(
        self, qkv: torch.Tensor, p: Projection, cos: torch.Tensor, sin: torch.Tensor, *places: Any
    ) -> torch.Tensor:
        assert qkv.is_contiguous()
        self.asked.append((p.query_heads, p.kv_heads))
        q, k, v = (y.unflatten(1, (-1, p.head_dim)) for y in qkv.split([w.rows for w in p.weights], dim=1))
        if p.q_norm is not None and p.k_norm is not None:
            q, k = reference.rms_norm(q, p.q_norm, p.eps), reference.rms_norm(k, p.k_norm, p.eps)
        reference.write_kv(reference.apply_rope(k, cos, sin, p.style), v, *places)
        q.copy_(reference.apply_rope(q, cos, sin, p.style))
        return q

    def gated_activation(self, gate: torch.Tensor, up: torch.Tensor, kind: Any) -> torch.Tensor:
        self.asked.append((gate.stride(0), up.stride(0)))
        return reference.gated_activation(gate, up, kind)


@pytest.fixture
def kernels() -> CudaKernels:
    made = CudaKernels.__new__(CudaKernels)
    made.device, made.exact = torch.device("cpu"), False
    made.prefill_kernels = PlainPrefill()
    made.tile_kernels = made.small_batch_kernels = PlainTiles()  # type: ignore[assignment]
    return made


def tiles_of(kernels: CudaKernels) -> PlainTiles:
    assert isinstance(kernels.tile_kernels, PlainTiles)
    return kernels.tile_kernels


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm()) < 2e-3


@pytest.mark.parametrize("scratch", [1 << 20, 48 * 512 * 2, 16 * 512 * 2])  # one part, two, five
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_matrix(kernels: CudaKernels, scratch: int, has_bias: bool) -> None:
    tiles = tiles_of(kernels)
    w = tiles.tiled("Q4_K", 72, 512, 1)
    x, bias = torch.randn(TOKENS, 512).to(HALF), torch.randn(72) if has_bias else None
    with patch.object(cuda_kernels, "EXPAND_BYTES", scratch):
        found = kernels.linear(x, w, bias)
    assert found.dtype == HALF and found.is_contiguous()
    assert tiles.expansions == -(-72 // (scratch // 1024))
    assert close(found, reference.linear(x.float(), tiles.planes[w.tiles.data_ptr()], bias))


@pytest.mark.parametrize("scratch", [1 << 20, 80 * 512 * 2])  # all in one product; one matrix after another
@pytest.mark.parametrize("has_bias", [False, True])
def test_matrices_that_share_their_input(kernels: CudaKernels, scratch: int, has_bias: bool) -> None:
    tiles = tiles_of(kernels)
    weights = [tiles.tiled(name, rows, 512, rows) for name, rows in (("Q4_K", 72), ("Q6_K", 40), ("Q4_K", 24))]
    x, biases = torch.randn(TOKENS, 512).to(HALF), [torch.randn(72), None, torch.randn(24)] if has_bias else None
    wanted = [
        reference.linear(x.float(), tiles.planes[w.tiles.data_ptr()], bias)
        for w, bias in zip(weights, biases or [None] * 3, strict=True)
    ]
    with patch.object(cuda_kernels, "EXPAND_BYTES", scratch):
        found = kernels.linears(x, weights, biases)
        joined = kernels.joined_linear(x, weights, biases)
    assert all(close(f, w) for f, w in zip(found, wanted, strict=True))
    assert close(joined, torch.cat(wanted, dim=1)) and joined.is_contiguous()
    shares = found[0].data_ptr() + 72 * 2 == found[1].data_ptr()
    assert shares == (scratch == 1 << 20)


def test_gate_and_up(kernels: CudaKernels) -> None:
    tiles = tiles_of(kernels)
    gate, up = tiles.tiled("Q4_K", 72, 512, 1), tiles.tiled("Q6_K", 72, 512, 2)
    x = (torch.randn(TOKENS, 512) * 0.01).to(HALF)
    g, u = (reference.linear(x.float(), tiles.planes[w.tiles.data_ptr()]) for w in (gate, up))
    found = kernels.gated_linear(x, gate, up, "silu")
    assert close(found, reference.gated_activation(g, u, "silu"))
    assert kernels.prefill_kernels.asked == [(144, 144)]  # type: ignore[attr-defined]


def test_gates_that_the_kernel_does_not_take(kernels: CudaKernels) -> None:
    wide = torch.randn(TOKENS, 160).to(HALF)
    pairs = [(wide[:, :70], wide[:, 80:150]), (wide[:, 4:76], wide[:, 80:152]), (wide[:0], wide[:0])]
    pairs += [(wide.float(), wide.float()), (wide.T[:, :64], wide.T[:, :64]), (wide, wide.bfloat16())]
    for gate, up in pairs:
        found = kernels.gated_activation(gate, up, "gelu_tanh")
        assert torch.equal(found, reference.gated_activation(gate, up, "gelu_tanh"))
    assert not kernels.prefill_kernels.asked  # type: ignore[attr-defined]


class PlainNorm(DecodeKernels):
    """Says what the kernel would be asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[torch.dtype, bool]] = []

    def add_rms_norm(self, residual: torch.Tensor, partial: Any, *args: Any, **options: Any) -> None:
        weight, eps, out = args
        assert not options["early"]  # what it adds may come from another stream
        self.asked.append((out.dtype, options["post_weight"] is not None))
        out.copy_(reference.add_rms_norm(partial, residual, weight, eps, options["offset"], options["post_weight"])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("post", [False, True])
def test_norms_take_the_kernel(kernels: CudaKernels, dtype: torch.dtype, post: bool) -> None:
    kernels.decode_kernels = norm = PlainNorm()
    x, residual, weight = torch.randn(TOKENS, 576).to(dtype), torch.randn(TOKENS, 576), torch.rand(576)
    post_weight = torch.rand(576) if post else None
    wanted = reference.add_rms_norm(x, residual.clone(), weight, 1e-5, 0.0, post_weight)
    group = SingleGroup()
    group.kernels = kernels
    found, same = group.reduce_add_norm(x, residual, weight, 1e-5, post_weight)
    assert same is residual and torch.equal(found, wanted[0]) and torch.equal(residual, wanted[1])
    assert norm.asked == [(dtype, post)]


@pytest.mark.parametrize("odd", ["float32", "width", "stride", "residual", "weight", "empty"])
def test_norms_that_the_kernel_does_not_take(kernels: CudaKernels, odd: str) -> None:
    kernels.decode_kernels = norm = PlainNorm()
    width, tokens = 578 if odd == "width" else 576, 0 if odd == "empty" else TOKENS
    x = torch.randn(tokens, width).to(torch.float32 if odd == "float32" else HALF)
    x = torch.cat((x, x), dim=1)[:, :width] if odd == "stride" else x
    residual = torch.randn(tokens, width).to(HALF if odd == "residual" else torch.float32)
    weight = torch.rand(width).to(HALF if odd == "weight" else torch.float32)
    wanted = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
    found, _ = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(found, wanted[0]) and torch.equal(residual, wanted[1]) and not norm.asked


def numbers_of(cache: torch.Tensor | QuantCache) -> torch.Tensor:
    return cache.dequantise() if isinstance(cache, QuantCache) else cache.float()


@pytest.mark.parametrize("kv_type", ["f16", "q8", "q4"])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("odd", ["", "float32", "head size", "no tokens"])
def test_projection(kernels: CudaKernels, kv_type: str, norms: bool, odd: str) -> None:
    """Taken by the kernel or not, the same queries, keys and values. No kernel quantises heads of 40."""
    tiles, cpu = tiles_of(kernels), torch.device("cpu")
    size, tokens = 40 if odd == "head size" else 32, 0 if odd == "no tokens" else TOKENS
    query, key, value = (tiles.tiled(n, h * size, 512, h) for n, h in (("Q4_K", 4), ("Q4_K", 2), ("Q6_K", 2)))
    q_norm, k_norm = (torch.rand(size), torch.rand(size)) if norms else (None, None)
    projection = Projection((query, key, value), None, size, "half", q_norm, k_norm, 1e-5)
    x = (torch.randn(tokens, 512) * 0.01).to(torch.float32 if odd == "float32" else HALF)
    angles, slots = torch.randn(tokens, size // 2), torch.randperm(6 * 16)[:tokens]
    found, wanted = ([make_cache(kv_type, (6, 16, 2, size), cpu) for _ in "kv"] for _ in range(2))
    q = kernels.project(x, projection, angles.cos(), angles.sin(), found[0], found[1], slots)
    plain = Kernels.project(kernels, x, projection, angles.cos(), angles.sin(), wanted[0], wanted[1], slots)
    assert q.shape == plain.shape == (tokens, 4, size) and torch.equal(q, plain)
    assert all(torch.equal(numbers_of(f), numbers_of(w)) for f, w in zip(found, wanted, strict=True))
    taken = not odd or (odd == "head size" and kv_type == "f16")
    asked: list[Any] = kernels.prefill_kernels.asked  # type: ignore[attr-defined]
    assert asked == ([(4, 2)] if taken else [])


class Late:
    """Rows that hold NaN until they are waited for. log: of what happens, in order."""

    def __init__(self, rows: torch.Tensor, number: int, log: list[str]) -> None:
        self.shape, self.dtype = tuple(rows.shape), rows.dtype
        self._rows, self._number, self._log = rows, number, log

    def wait(self) -> torch.Tensor:
        self._log.append(f"wait {self._number}")
        return self._rows


def late_parts(kernels: CudaKernels, x: torch.Tensor, sizes: Sequence[int]) -> tuple[list[Rows], list[str]]:
    """The rows of x as they may come, and what is done with them and with weights."""
    log: list[str] = []
    tiles = tiles_of(kernels)
    expand = tiles._expand

    def logged(*arguments: Any) -> None:
        log.append("expand")
        expand(*arguments)

    tiles._expand = logged  # type: ignore[method-assign]
    parts: list[Rows] = [Late(rows, number, log) for number, rows in enumerate(x.split(list(sizes)))]
    return parts, log


SIZES = [(35, 35), (1, 69), (69, 1), (7, 60, 3)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scratch", [1 << 20, 48 * 512 * 2, 16 * 512 * 2])  # one run of rows, two, five
@pytest.mark.parametrize("has_bias", [False, True])
def test_parts_of_a_product(kernels: CudaKernels, sizes: tuple[int, ...], scratch: int, has_bias: bool) -> None:
    """Each run of the weight's rows is expanded once, and a part is given on before the next one's last product."""
    tiles = tiles_of(kernels)
    w = tiles.tiled("Q4_K", 72, 512, 1)
    x, bias = torch.randn(TOKENS, 512).to(HALF), torch.randn(72) if has_bias else None
    with patch.object(cuda_kernels, "EXPAND_BYTES", scratch), patch.object(torch, "empty", poisoned):
        found = []
        for rows in kernels.linear_in_parts(x, sizes, w, bias):
            assert rows.is_contiguous() and rows.shape == (sizes[len(found)], 72)
            found.append(rows.clone())
            rows.fill_(float("nan"))  # the caller's, from now on
    assert tiles.expansions == -(-72 // (scratch // 1024))
    assert [len(rows) for rows in found] == list(sizes)
    assert close(torch.cat(found), reference.linear(x.float(), tiles.planes[w.tiles.data_ptr()], bias))


def poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
    made = torch.zeros(*arguments, **options)
    return made.fill_(float("nan")) if made.is_floating_point() else made


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scratch", [1 << 20, 80 * 512 * 2])  # both matrices at once; one after the other
def test_gate_and_up_of_parts(kernels: CudaKernels, sizes: tuple[int, ...], scratch: int) -> None:
    """Weights are expanded before the first part is waited for, each once."""
    tiles = tiles_of(kernels)
    gate, up = tiles.tiled("Q4_K", 72, 512, 1), tiles.tiled("Q6_K", 72, 512, 2)
    x, biases = (torch.randn(TOKENS, 512) * 0.01).to(HALF), (torch.randn(72), None)
    planes = [tiles.planes[w.tiles.data_ptr()] for w in (gate, up)]
    g, u = (reference.linear(x.float(), w, bias) for w, bias in zip(planes, biases, strict=True))
    parts, log = late_parts(kernels, x, sizes)
    with patch.object(cuda_kernels, "EXPAND_BYTES", scratch):
        found = kernels.gated_linear_of_parts(parts, gate, up, "silu", *biases)
    assert close(found, reference.gated_activation(g, u, "silu"))
    waits = [f"wait {number}" for number in range(len(sizes))]
    together = scratch == 1 << 20
    assert log == (["expand", "expand", *waits] if together else ["expand", *waits] * 2)
    assert kernels.prefill_kernels.asked == [(144, 144)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["tiles", "joined floats", "floats", "other floats", "few"])
def test_projection_of_parts(kernels: CudaKernels, kind: str) -> None:
    """The same queries, keys and values as those of all rows at once, whatever multiplies."""
    tiles, cpu, size = tiles_of(kernels), torch.device("cpu"), 32
    kernels.float_kernels = FloatKernels.__new__(FloatKernels)
    weights: list[QuantTensor] = [
        tiles.tiled(name, heads * size, 512, heads) for name, heads in (("Q4_K", 4), ("Q4_K", 2), ("Q6_K", 2))
    ]
    if "floats" in kind:
        whole = torch.cat([dequantize(w) for w in weights]).to(torch.bfloat16 if kind == "other floats" else HALF)
        planes = [
            plane if kind == "joined floats" else plane.clone() for plane in whole.split([w.rows for w in weights])
        ]
        weights = [QuantTensor(QUANT_TYPES["F16"], *plane.shape, {"weight": plane}) for plane in planes]
    biases = (torch.randn(4 * size), None, torch.randn(2 * size))
    projection = Projection((weights[0], weights[1], weights[2]), biases, size, "half", None, None, 1e-5)
    x = (torch.randn(TOKENS, 512) * 0.01).to(HALF)
    angles, slots = torch.randn(TOKENS, size // 2), torch.randperm(6 * 16)[:TOKENS]
    found, wanted = ([make_cache("f16", (6, 16, 2, size), cpu) for _ in "kv"] for _ in range(2))
    parts, log = late_parts(kernels, x, (35, 35))
    with patch.object(kernels, "_few", wraps=kernels._few) as few, patch.object(kernels, "_multiply", by_expansion):
        if kind == "few":
            few.side_effect = lambda few_of, _: few_of
        q = kernels.project_parts(parts, projection, angles.cos(), angles.sin(), found[0], found[1], slots)
    asked = list(log)
    plain = Kernels.project(kernels, x, projection, angles.cos(), angles.sin(), wanted[0], wanted[1], slots)
    assert close(q, plain)
    assert all(close(numbers_of(f), numbers_of(w)) for f, w in zip(found, wanted, strict=True))
    order = {"tiles": ["expand"] * 3 + ["wait 0", "wait 1"], "floats": ["wait 0", "wait 1"] * 3}
    assert asked == order.get(kind, ["wait 0", "wait 1"])


def by_expansion(x: torch.Tensor, weights: Sequence[QuantTensor], bias: torch.Tensor | None) -> torch.Tensor:
    product = torch.cat([reference.linear(x.float(), w) for w in weights], dim=1)
    return (product if bias is None else product + bias).to(x.dtype)
