"""The launch from one attention to the next (layer.cu) against the same arithmetic in float64, many in a row."""

from __future__ import annotations

from typing import Any

import pytest
import tiled_weights
import torch
from tiled_weights import error

from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels.cuda.layer import LayerKernel, LayerPhases, LayerShape, Matrices, Places, places_bytes
from multitensor.kernels.cuda.layer_weights import FloatRows, Tiles, ways_to_lie
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.parallel.rank_memory import NOTHING

pytestmark = pytest.mark.gpu
EPS = 1e-5
LAUNCHES = 4  # of a step: not a multiple of the sets of places


@pytest.fixture(scope="module")
def kernels() -> Any:
    from multitensor.kernels.cuda.matrix import TileKernels

    return TileKernels(torch.device("cuda:0"))


FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16}


def weight(name: str, rows: int, cols: int, start: int, stop: int, seed: int) -> tuple[QuantTensor, torch.Tensor]:
    """Small enough for sums over thousands of them to stay within float16."""
    if name in FLOATS:
        generator = torch.Generator("cuda").manual_seed(seed)
        plane = torch.randn(rows, stop - start, device="cuda", generator=generator).mul(0.02).to(FLOATS[name])
        return QuantTensor(QUANT_TYPES[name], rows, stop - start, {"weight": plane}), plane.double()
    tiled, numbers = tiled_weights.weight(name, rows, cols, start, stop, seed, 5e-4)
    return tiled, numbers.double()


def normed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w.double()


class Case:
    """One layer's weights: hidden, attention columns [a0, a1) of 2 a1, units [f0, f1) of more, up to four types."""

    def __init__(self, types: tuple[str, ...], hidden: int, heads: tuple[int, int], ffn: tuple[int, int], **more: Any):
        first, second, third, fourth = (types[i % len(types)] for i in range(4))
        whole = -(-max(heads[1], ffn[1]) // 256) * 256
        self.output = weight(first, hidden, whole, *heads, 1)
        rows = ffn[1] - ffn[0]
        self.gate, self.up = weight(first, rows, hidden, 0, hidden, 2), weight(second, rows, hidden, 0, hidden, 3)
        self.down = weight(fourth, hidden, whole, *ffn, 4)
        self.following = [
            weight(name, n, hidden, 0, hidden, 5 + n) for name, n in ((first, 200), (third, 72), (second, 72))
        ]
        self.hidden, self.types = hidden, types
        generator = torch.Generator("cuda").manual_seed(0)

        def vector(n: int, present: bool = True) -> torch.Tensor | None:
            return torch.rand(n, device="cuda", generator=generator) + 0.5 if present else None

        post, bias = more.get("post", False), more.get("bias", False)
        self.norms = {"ffn_norm": vector(hidden), "next_norm": vector(hidden)}
        self.norms |= {"post_attention_norm": vector(hidden, post), "post_ffn_norm": vector(hidden, post)}
        self.biases = [vector(n, bias) for n in (hidden, 2 * rows, hidden, 344)]
        parts = ((self.output,), (self.gate, self.up), (self.down,), self.following)
        matrices = [Matrices(tuple(t for t, _ in part), b) for part, b in zip(parts, self.biases, strict=True)]
        self.phases = LayerPhases(*matrices, **self.norms, logits=more.get("logits", False))

    def wanted(self, mixed: torch.Tensor, residual: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
        def product(x: torch.Tensor, ws: Any, bias: torch.Tensor | None) -> torch.Tensor:
            y = torch.cat([x @ w.T for _, w in ws], dim=1)
            return y if bias is None else y + bias.double()

        def added(r: torch.Tensor, x: torch.Tensor, post: torch.Tensor | None) -> torch.Tensor:
            return r + (x if post is None else normed(x, post))

        norms = self.norms
        x = product(mixed.double(), [self.output], self.biases[0])
        residual = added(residual.double(), x, norms["post_attention_norm"])
        gate, up = product(normed(residual, norms["ffn_norm"]), [self.gate, self.up], self.biases[1]).chunk(2, dim=1)
        act = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
        inner = (act * up).to(mixed.dtype).double()
        residual = added(residual, product(inner, [self.down], self.biases[2]), norms["post_ffn_norm"])
        return product(normed(residual, norms["next_norm"]), self.following, self.biases[3]), residual


CASES = {
    "one type": (("Q4_K", "Q4_K"), 1024, (0, 1024), (0, 2816), {}),
    "two types": (("Q4_K", "Q6_K"), 4096, (0, 4096), (0, 14336), {}),
    "cut inside super-blocks, post norms": (("Q4_K", "Q6_K"), 768, (64, 320), (384, 768), {"post": True}),
    "biases, logits": (("Q8_0", "Q4_1"), 2304, (96, 1120), (32, 1184), {"bias": True, "logits": True}),
    "rows not whole super-blocks": (("Q8_0", "Q4_0"), 576, (0, 192), (0, 768), {}),
    "three types": (("Q4_K", "Q5_K", "Q6_K"), 1024, (0, 1024), (0, 2816), {}),
    "four types": (("Q3_K", "IQ4_XS", "Q6_K", "Q5_0"), 1024, (0, 1024), (0, 2816), {"post": True}),
    "wide": (("Q5_K", "Q4_0"), 8192, (0, 2048), (0, 3584), {"post": True, "bias": True}),
    "float16": (("F16", "F16"), 4096, (0, 4096), (0, 14336), {}),
    "bfloat16": (("BF16", "BF16"), 4096, (0, 2048), (0, 7168), {"logits": True}),
    "bfloat16, odd sizes": (("BF16", "BF16"), 576, (0, 192), (0, 264), {"post": True, "bias": True}),
    "float16, wide": (("F16", "F16"), 8192, (0, 4096), (0, 14336), {"post": True}),
}


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_layer(kernels: Any, name: str, dtype: torch.dtype, tokens: int) -> None:
    types, hidden, heads, ffn, more = CASES[name]
    case = Case(types, hidden, heads, ffn, **more)
    run_launches(kernels, case, dtype, tokens, {})


@pytest.mark.parametrize("warps", [6, 8, 12])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tokens", [1, 2])
def test_as_smaller_gpus_do_it(kernels: Any, tokens: int, overlap: bool, warps: int) -> None:
    """With fewer warps, and with the copies of GPUs before compute capability 9.0."""
    types, hidden, heads, ffn, more = CASES["cut inside super-blocks, post norms"]
    case = Case(types, hidden, heads, ffn, **more)
    run_launches(kernels, case, torch.float16, tokens, {"warps": warps, "overlap": overlap})


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("columns", "warps"), [(256, 8), (256, 4), (128, 8), (128, 6), (64, 8), (64, 4)])
def test_float_rows_in_every_shape(kernels: Any, columns: int, warps: int, tokens: int, overlap: bool) -> None:
    types, hidden, heads, ffn, more = CASES["bfloat16, odd sizes"]
    case = Case(types, hidden, heads, ffn, **more)
    lie = FloatRows(torch.bfloat16, columns)
    run_launches(kernels, case, torch.bfloat16, tokens, {"warps": warps, "overlap": overlap}, lie)


def run_launches(
    kernels: Any, case: Case, dtype: torch.dtype, tokens: int, options: dict[str, Any], lie: Any = None
) -> None:
    hidden = case.hidden
    ways = [lie] if lie else ways_to_lie(w for product in case.phases.products for w in product.weights)
    shapes = [LayerShape.of([case.phases], tokens, kernels.blocks, way) for way in ways]
    shape = next(shape for shape in shapes if shape.warps(kernels.shared_limit))
    memory = torch.full((places_bytes(hidden, tokens, 1) // 4,), NOTHING, dtype=torch.int32, device="cuda")
    kernel = LayerKernel(
        kernels,
        shape,
        dtype,
        hidden=hidden,
        rank=0,
        places=Places(torch.tensor([memory.data_ptr()], device="cuda"), memory),
        inner=case.down[0].cols,
        **options,
    )
    steps = torch.zeros(1, dtype=torch.int32, device="cuda")
    gelu = case.norms["post_ffn_norm"] is not None
    for launch in range(5 * LAUNCHES):
        steps.fill_(launch // LAUNCHES % 3)
        mixed = torch.randn(tokens, case.output[0].cols, device="cuda", dtype=dtype)
        residual = torch.randn(tokens, hidden, device="cuda")
        if launch == 7:
            mixed.zero_()  # sums that are exactly zero, of either sign, must arrive
        out_type = torch.float32 if case.phases.logits else dtype
        out = torch.full((tokens, case.phases.following.rows), float("nan"), device="cuda", dtype=out_type)
        new_residual = torch.full_like(residual, float("nan"))
        arguments: dict[str, Any] = {
            "eps": EPS,
            "gelu": gelu,
            "steps": steps,
            "launches": LAUNCHES,
            "number": launch % LAUNCHES,
        }
        kernel.run(case.phases, mixed, residual, new_residual, out, **arguments)
        wanted, wanted_residual = case.wanted(mixed, residual, gelu)
        rounding = 2e-2 if dtype == torch.bfloat16 else 3e-3  # of the activations between gate-up and down
        assert error(new_residual, wanted_residual) < rounding
        for columns in (slice(0, 200), slice(200, 272), slice(272, 344)):
            assert error(out[:, columns], wanted[:, columns]) < rounding


def test_what_does_not_fit_is_refused(kernels: Any) -> None:
    shape = LayerShape(Tiles(("Q4_K", "Q6_K")), 2, 300, (1, 1, 1, 1))
    nowhere = Places(torch.zeros(1, dtype=torch.int64, device="cuda"), None)
    with pytest.raises(ValueError, match="no room"):
        LayerKernel(kernels, shape, torch.float16, hidden=8192, rank=0, places=nowhere, inner=76800)
