"""Launches between two attentions (layer.cu) in a row, on one rank and several, and the same arithmetic in float64: for
an emulated GPU, and for ranks that share a real one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import random_weights as rw
import torch

from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels.cuda.layer import (
    STEPS,
    LayerKernel,
    LayerPhases,
    LayerShape,
    Matrices,
    Places,
    mail_bytes,
    places_bytes,
)
from multitensor.kernels.cuda.layer_weights import FloatRows, LayerWeights, ways_to_lie
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.parallel.rank_memory import NOTHING

EPS = 1e-5
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """types: of the matrices in turn. attention, ffn: columns of rank 0; the others have 32 fewer."""

    types: tuple[str, ...]
    dtype: torch.dtype
    ranks: int = 1
    relay: bool = False
    tokens: int = 1
    hidden: int = 288
    attention: int = 128
    ffn: int = 288
    following: tuple[int, ...] = (48, 16, 24)
    post: bool = False
    bias: bool = False
    gelu: bool = False
    logits: bool = False
    start: int = 0  # column of a super-block at which the slices of output and down begin
    tile: int = 0  # columns of a float tile
    warps: int = 2
    blocks: int = 2
    launches: int = 2  # of a step: three or four sets of places take turns, whatever their number
    steps: int = 7


CASES = {
    "two types": Case(("Q4_K", "Q6_K"), torch.float16, post=True),
    "two ranks, two tokens": Case(("Q4_K", "Q4_K"), torch.bfloat16, ranks=2, tokens=2, logits=True, blocks=3),
    "wider, biases": Case(
        ("Q4_K", "Q6_K"), torch.float16, ranks=2, tokens=2, bias=True, post=True, hidden=544, steps=4
    ),
    "two tokens, mail, gelu": Case(("Q5_0", "Q8_0"), torch.float16, ranks=2, relay=True, tokens=2, gelu=True, steps=4),
    "bfloat16, logits": Case(("BF16", "BF16"), torch.bfloat16, tile=256, tokens=2, logits=True, post=True),
    "float16, wider": Case(("F16", "F16"), torch.float16, tile=128, tokens=2, hidden=544, warps=3, steps=4),
    "three types": Case(("Q4_K", "Q5_K", "Q6_K"), torch.float16, ranks=2),
    "four types": Case(("Q3_K", "IQ4_XS", "MXFP4", "Q2_K"), torch.bfloat16, tokens=2, post=True, bias=True),
    "inside super-blocks": Case(("Q8_0", "Q4_1"), torch.float16, start=32, bias=True, gelu=True, warps=3),
    "mail, three ranks": Case(("Q5_K", "Q5_0"), torch.float16, ranks=3, relay=True, launches=1, steps=9),
    "mail, two tokens": Case(("Q6_K", "Q6_K"), torch.bfloat16, ranks=2, relay=True, tokens=2, post=True, bias=True),
    "float16": Case(("F16", "F16"), torch.float16, tile=64, post=True, bias=True, hidden=264, attention=72),
    "bfloat16, two ranks": Case(("BF16", "BF16"), torch.bfloat16, ranks=2, tile=256, tokens=2, gelu=True, blocks=3),
    "bfloat16, mail": Case(("BF16", "BF16"), torch.bfloat16, ranks=2, relay=True, tile=128, warps=3, launches=3),
    "float16 weights, bfloat16, mail of five": Case(
        ("F16", "F16"), torch.bfloat16, ranks=5, relay=True, tile=64, launches=1, steps=13, hidden=128, ffn=192
    ),
}


class Weights:
    """One rank's, and the numbers that they stand for, float64."""

    def __init__(self, case: Case, rank: int, device: torch.device) -> None:
        self._device = device
        self._case, self._seed = case, 120 * rank  # the types in the same order: one program serves all ranks
        less = 32 * (rank > 0)
        hidden, ffn = case.hidden, case.ffn - less
        self.output = [self._weight(hidden, case.attention - less, case.start)]
        self.gated = [self._weight(ffn, hidden), self._weight(ffn, hidden)]
        self.down = [self._weight(hidden, ffn, case.start)]
        self.following = [self._weight(rows, hidden) for rows in case.following]
        generator = torch.Generator().manual_seed(rank)
        sizes = (hidden, 2 * ffn, hidden, sum(case.following))
        self.biases = [(torch.randn(n, generator=generator) * 0.1).to(device) if case.bias else None for n in sizes]

    def _weight(self, rows: int, cols: int, start: int = 0) -> tuple[QuantTensor, torch.Tensor]:
        self._seed += 1
        name = self._case.types[self._seed % len(self._case.types)]
        kind = QUANT_TYPES[name]
        if name in FLOATS:
            generator = torch.Generator().manual_seed(self._seed)
            plane = (torch.randn(rows, cols, generator=generator) * 0.05).to(self._device, FLOATS[name])
            return QuantTensor(kind, rows, cols, {"weight": plane}), plane.double()
        whole = -(-(start + cols) // 256) * 256
        weight, numbers = rw.tiled(name, rows, whole, start, start + cols, self._seed, 5e-3, str(self._device))
        return weight, numbers.double()

    @property
    def matrices(self) -> list[Matrices]:
        products = (self.output, self.gated, self.down, self.following)
        return [Matrices(tuple(w for w, _ in ws), b) for ws, b in zip(products, self.biases, strict=True)]


@dataclass
class Rank:
    weights: Weights
    phases: LayerPhases
    kernel: LayerKernel
    mixed: list[torch.Tensor] = field(default_factory=list)
    out: list[torch.Tensor] = field(default_factory=list)
    residual: list[torch.Tensor] = field(default_factory=list)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * weight.double()


def product(
    x: torch.Tensor, weights: list[tuple[QuantTensor, torch.Tensor]], bias: torch.Tensor | None
) -> torch.Tensor:
    y = torch.cat([x.double() @ numbers.T for _, numbers in weights], dim=1)
    return y if bias is None else y + bias.double()


def memories(case: Case, device: torch.device) -> list[Places]:
    """Of every rank, as PeerMemory and HostMemory share them."""
    size = places_bytes(case.hidden, case.tokens, case.ranks) // 4
    own = [torch.full((size,), NOTHING, dtype=torch.int32, device=device) for _ in range(case.ranks)]
    if not case.relay:
        return [Places(torch.tensor([place.data_ptr() for place in own], device=device), own) for _ in own]
    size = mail_bytes(case.hidden, case.tokens) // 4
    on_gpu = device.type == "cuda"
    boxes = [torch.empty(size, dtype=torch.int32, pin_memory=on_gpu).fill_(NOTHING) for _ in own]
    tables = []
    for rank, place in enumerate(own):
        addresses = [box.data_ptr() for box in boxes]
        addresses.append(addresses[rank])
        addresses[rank] = place.data_ptr()
        tables.append(Places(torch.tensor(addresses, device=device), (own, boxes), relay=True))
    return tables


class Launches:
    """All launches of all ranks of a case, and the norms that they share. gpu: what LayerKernel asks of TileKernels."""

    def __init__(self, case: Case, gpu: Any) -> None:
        self.case, self.device = case, gpu.device
        self.generator = torch.Generator().manual_seed(0)
        self.norms = {"ffn_norm": self._vector(), "next_norm": self._vector()}
        self.norms |= {"post_attention_norm": self._vector(case.post), "post_ffn_norm": self._vector(case.post)}
        self.ranks = [self._rank(gpu, number, places) for number, places in enumerate(memories(case, gpu.device))]
        self.count = case.launches * case.steps
        self.before = [self._normal(case.tokens, case.hidden) for _ in range(self.count)]
        steps = [i // case.launches % STEPS for i in range(self.count)]
        self._steps = torch.tensor(steps, dtype=torch.int32, device=self.device)
        for rank in self.ranks:
            self._buffers(rank)

    def _vector(self, present: bool = True) -> torch.Tensor | None:
        return (torch.rand(self.case.hidden, generator=self.generator) + 0.5).to(self.device) if present else None

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def _rank(self, gpu: Any, number: int, places: Places) -> Rank:
        case = self.case
        weights = Weights(case, number, self.device)
        phases = LayerPhases(*weights.matrices, **self.norms, logits=case.logits)  # type: ignore[arg-type]
        lie: LayerWeights = ways_to_lie(w for matrices in weights.matrices for w in matrices.weights)[0]
        if case.tile:
            assert isinstance(lie, FloatRows)
            lie = FloatRows(lie.dtype, case.tile)
        shape = LayerShape.of([phases], case.tokens, gpu.blocks, lie)
        inner = weights.down[0][0].cols
        sizes: dict[str, Any] = {"hidden": case.hidden, "inner": inner, "warps": case.warps}
        return Rank(weights, phases, LayerKernel(gpu, shape, case.dtype, rank=number, places=places, **sizes))

    def _buffers(self, rank: Rank) -> None:
        case = self.case
        for i in range(self.count):
            mixed = self._normal(case.tokens, rank.weights.output[0][0].cols).to(case.dtype)
            if i == 3:
                mixed.zero_()  # sums that are exactly zero, of either sign, must arrive
            out_type = torch.float32 if case.logits else case.dtype
            out = torch.full((case.tokens, sum(case.following)), float("nan"), dtype=out_type, device=self.device)
            rank.mixed.append(mixed)
            rank.out.append(out)
            rank.residual.append(torch.full_like(self.before[i], float("nan")))

    def launch(self, rank: Rank, i: int) -> None:
        rank.kernel.run(
            rank.phases,
            rank.mixed[i],
            self.before[i],
            rank.residual[i],
            rank.out[i],
            eps=EPS,
            gelu=self.case.gelu,
            steps=self._steps[i],
            launches=self.case.launches,
            number=i % self.case.launches,
        )

    def check(self) -> None:
        for i in range(self.count):
            check(self.case, self.ranks, self.norms, self.before[i], i)


def check(case: Case, ranks: list[Rank], norms: dict[str, torch.Tensor | None], before: torch.Tensor, i: int) -> None:
    """Launch i of every rank against the same arithmetic in float64; all ranks hold the same residual stream."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        """As float weights take their activations; quantised ones take 16-bit integers, which is finer."""
        return x.to(case.dtype).double() if case.types[0] in FLOATS else x

    def added(residual: torch.Tensor, total: torch.Tensor, post: torch.Tensor | None) -> torch.Tensor:
        return residual + (total if post is None else normed(total, post))

    weights = [rank.weights for rank in ranks]
    parts = [product(rank.mixed[i], w.output, w.biases[0]) for rank, w in zip(ranks, weights, strict=True)]
    residual = added(before.double(), torch.stack(parts).sum(0), norms["post_attention_norm"])
    assert norms["ffn_norm"] is not None and norms["next_norm"] is not None
    x = rounded(normed(residual, norms["ffn_norm"]))
    parts = []
    for w in weights:
        gate, up = product(x, w.gated, w.biases[1]).chunk(2, dim=1)
        act = torch.nn.functional.gelu(gate, approximate="tanh") if case.gelu else torch.nn.functional.silu(gate)
        parts.append(product((act * up).to(case.dtype), w.down, w.biases[2]))
    residual = added(residual, torch.stack(parts).sum(0), norms["post_ffn_norm"])
    x = rounded(normed(residual, norms["next_norm"]))
    rounding = 1.5e-2 if case.dtype == torch.bfloat16 else 2e-3
    for rank, w in zip(ranks, weights, strict=True):
        assert torch.equal(rank.residual[i], ranks[0].residual[i])
        for found, wanted in ((rank.residual[i], residual), (rank.out[i], product(x, w.following, w.biases[3]))):
            assert rw.error(found, wanted) < rounding
