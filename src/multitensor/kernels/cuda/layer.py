"""What a decode step does between two attentions, as one launch for one to four tokens: layer.cu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multitensor.kernels.cuda.layer_weights import LayerWeights
from multitensor.kernels.cuda.matrix import MAX_MATRICES, TileKernels
from multitensor.kernels.cuda.program import Program, launch
from multitensor.kernels.cuda.tiles import COLUMNS, ROWS
from multitensor.kernels.quant_tensor import QuantTensor

MAX_TOKENS = 2  # more are faster in kernels of their own (docs/perf-log.md)
MAX_HIDDEN = 16384
STAGES = 2  # of a warp's ring. Measured: with more copies under way the numbers that are waited for come later
_FIXED_BYTES = 640  # struct Fixed of layer.cu, for up to 16 ranks
_SETS, _MAIL_SETS = 3, 4
STEPS = 12  # the count of steps that `run` takes starts again there: a multiple of both
_GATED = 1  # of the four products
_NULL = torch.empty(0)  # its address is 0


@dataclass(frozen=True)
class Matrices:
    """Up to three weights with the same columns, one behind the other in the result; bias: float32 of all rows."""

    weights: tuple[QuantTensor, ...]
    bias: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return sum(w.rows for w in self.weights)


@dataclass(frozen=True)
class LayerPhases:
    """The products of one launch, and the norms between them: float32 [hidden], post norms None where there are none.

    following: the next layer's query, key and value, or the LM head, whose result is float32 (logits).
    """

    output: Matrices
    gated: Matrices
    down: Matrices
    following: Matrices
    ffn_norm: torch.Tensor
    next_norm: torch.Tensor
    post_attention_norm: torch.Tensor | None
    post_ffn_norm: torch.Tensor | None
    logits: bool

    @property
    def products(self) -> tuple[Matrices, Matrices, Matrices, Matrices]:
        return self.output, self.gated, self.down, self.following

    def block_tiles(self, blocks: int, lie: LayerWeights) -> tuple[int, ...]:
        """Of each product, the tiles that a block gets at most of the row groups dealt to `blocks` blocks in turn."""
        counts = []
        for number, matrices in enumerate(self.products):
            groups = [-(-w.rows // ROWS) for w in matrices.weights]
            tiles = lie.column_tiles(matrices.weights[0])
            jobs, each = (groups[0], 2 * tiles) if number == _GATED else (sum(groups), tiles)
            counts.append(-(-jobs // blocks) * each)
        return tuple(counts)

    @property
    def widest(self) -> int:
        """Super-blocks of 256 columns of the widest input."""
        return max(-(-(m.weights[0].phase + m.weights[0].cols) // COLUMNS) for m in self.products)


@dataclass(frozen=True)
class LayerShape:
    """What the launches of one step have in common. lie: how their weights do. widest: super-blocks of the widest
    input. tiles: as LayerPhases.block_tiles, the most of any."""

    lie: LayerWeights
    tokens: int
    widest: int
    tiles: tuple[int, ...]

    @staticmethod
    def of(phases: Sequence[LayerPhases], tokens: int, blocks: int, lie: LayerWeights) -> LayerShape:
        tiles = [max(counts) for counts in zip(*(p.block_tiles(blocks, lie) for p in phases), strict=True)]
        return LayerShape(lie, tokens, max(p.widest for p in phases), tuple(tiles))

    def longest(self, warps: int) -> int:
        """Tiles that a warp gets at most."""
        return sum(-(-count // warps) for count in self.tiles)

    def shared_bytes(self, warps: int) -> int:
        """Dynamic shared memory of a block: ring and barriers, parts of sums, what stays fixed, activations, lists."""
        ring = warps * STAGES * (self.lie.stage_bytes + 8)
        activations = self.lie.input_bytes(self.widest, self.tokens)
        lists = 8 * warps * self.longest(warps) if self.lie.listed else 0
        return ring + warps * 1024 + _FIXED_BYTES + activations + lists

    def warps(self, limit: int) -> int:
        """The most warps whose shared memory stays within `limit`; 0: the kernel cannot serve."""
        return next((warps for warps in self.lie.warps if self.shared_bytes(warps) <= limit), 0)


@dataclass(frozen=True)
class Places:
    """Where a launch's ranks leave their parts of sums.

    table: int64 on the device. For every rank the address, as this GPU sees it, of `places_bytes` bytes of its memory;
    or, where `relay` (ranks whose GPUs do not reach each other's memory), that of this rank only, for the others the
    address of `mail_bytes` bytes of their mailbox in host memory, and one more for this rank's. All of it holds -0.0 at
    first. own: what keeps this rank's alive.
    """

    table: torch.Tensor
    own: object
    relay: bool = False

    @property
    def ranks(self) -> int:
        return self.table.numel() - self.relay


class LayerKernel:
    """For one number of tokens; all launches of a step share its places, and follow one another on one stream.

    inner: columns of the down projection. warps, overlap: other than what the device is best served with; without
    overlap the copies of weights are those of GPUs before compute capability 9.0.
    """

    def __init__(
        self,
        tiles: TileKernels,
        shape: LayerShape,
        dtype: torch.dtype,
        *,
        hidden: int,
        rank: int,
        places: Places,
        inner: int,
        warps: int | None = None,
        overlap: bool | None = None,
    ) -> None:
        self._warps = shape.warps(tiles.shared_limit) if warps is None else warps
        self._shared = shape.shared_bytes(self._warps) if self._warps else 0
        if self._warps == 0 or self._shared > tiles.shared_limit:
            raise ValueError(f"{shape.tokens} tokens of {256 * shape.widest} columns leave no room for weights")
        self._tiles, self._lie, self._rank, self._places = tiles, shape.lie, rank, places
        self._widest, self._longest = shape.widest, shape.longest(self._warps)
        self._overlap = tiles.overlap if overlap is None else overlap
        # -0.0 as well: see layer.cu
        self._inner = torch.full((_SETS, shape.tokens, inner), -(1 << 15), dtype=torch.int16, device=tiles.device)
        defines: dict[str, object] = {
            **shape.lie.defines(),
            "NWARPS": self._warps,
            "NSTAGES": STAGES,
            "BFLOAT_MODE": str(dtype == torch.bfloat16).lower(),
            "HIDDEN": hidden,
            "TOKENS": shape.tokens,
            "RANKS": places.ranks,
            "FIXED_BYTES": _FIXED_BYTES,
        }
        if tiles.overlap and not self._overlap:
            defines["NO_BULK"] = 1
        if places.relay:
            defines["RELAY"] = "true"
        self._kernel = Program(shape.lie.sources, defines, tiles.device).kernel("layer")

    def run(
        self,
        phases: LayerPhases,
        mixed: torch.Tensor,
        residual: torch.Tensor,
        new_residual: torch.Tensor,
        out: torch.Tensor,
        *,
        eps: float,
        gelu: bool,
        steps: torch.Tensor,
        launches: int,
        number: int,
    ) -> None:
        """mixed: attention's result [T, columns], 16-bit. residual, new_residual: float32 [T, hidden], two tensors.
        out: [T, rows of `following`], in mixed's type or float32 for logits. steps: int32 [1], the count of steps
        modulo STEPS, the same on all ranks; a step makes `launches` launches, this is its `number`-th from 0 on."""
        arguments = (
            *(argument for matrices in phases.products for argument in _arguments(matrices, self._lie)),
            *(mixed, residual, new_residual, phases.ffn_norm, _or_null(phases.post_attention_norm)),
            *(phases.next_norm, _or_null(phases.post_ffn_norm), float(eps), out, int(phases.logits), int(gelu)),
            *(self._places.table, self._inner, steps, launches, number, self._rank, self._widest, self._longest),
        )
        grid, threads = self._tiles.blocks, 32 * self._warps
        launch(self._kernel, grid, threads, self._shared, arguments, overlap=self._overlap)


def places_bytes(hidden: int, tokens: int, ranks: int) -> int:
    """Bytes of the places for partial sums in every rank's memory."""
    return _SETS * 2 * ranks * tokens * hidden * 4


def mail_bytes(hidden: int, tokens: int) -> int:
    """Bytes of a rank's mailbox for partial sums."""
    return _MAIL_SETS * 2 * tokens * hidden * 4


def _arguments(matrices: Matrices, lie: LayerWeights) -> Sequence[object]:
    weights = matrices.weights
    pad = MAX_MATRICES - len(weights)
    first = weights[0]
    if {(w.cols, w.phase) for w in weights} != {(first.cols, first.phase)} or first.cols % 8 or first.phase % 8:
        raise ValueError("the matrices of a launch must have the same columns, in eights")
    return (
        *(lie.address(w) for w in weights),
        *[_NULL] * pad,
        _or_null(matrices.bias),
        *(w.rows for w in weights),
        *[0] * pad,
        *(lie.kinds(weights), first.cols, first.phase, lie.column_tiles(first)),
    )


def _or_null(tensor: torch.Tensor | None) -> torch.Tensor:
    return _NULL if tensor is None else tensor
