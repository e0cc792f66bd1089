"""What a decode step does between two attentions, as one launch for one or two tokens: layer.cu."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from multitensor.kernels.cuda.matrix import MAX_MATRICES, TileKernels
from multitensor.kernels.cuda.program import Program, launch
from multitensor.kernels.cuda.tiles import TILE_BYTES, TiledTensor
from multitensor.kernels.quant_tensor import QuantTensor

MAX_TOKENS = 2
MAX_HIDDEN = 16384
WARPS = (16, 12, 8, 6)  # of a block: the most that its multiprocessor has the memory for
STAGES = 2  # of a warp's ring. Measured: with more copies under way the numbers that are waited for come later
_FIXED_BYTES = 640  # struct Fixed of layer.cu, for up to 16 ranks
_SETS = 3
_GATED = 1  # of the four products
_NULL = torch.empty(0)  # its address is 0


@dataclass(frozen=True)
class Matrices:
    """Up to three weights with the same columns, one behind the other in the result; bias: float32 of all rows."""

    weights: tuple[TiledTensor, ...]
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

    def block_tiles(self, blocks: int) -> tuple[int, ...]:
        """Of each product, the tiles that a block gets at most of the row groups dealt to `blocks` blocks in turn."""
        counts = []
        for number, matrices in enumerate(self.products):
            groups = [w.tiles.shape[0] for w in matrices.weights]
            tiles = matrices.weights[0].column_blocks
            jobs, each = (groups[0], 2 * tiles) if number == _GATED else (sum(groups), tiles)
            counts.append(-(-jobs // blocks) * each)
        return tuple(counts)

    @property
    def widest(self) -> int:
        """Super-blocks of 256 columns of the widest input."""
        return max(matrices.weights[0].column_blocks for matrices in self.products)


@dataclass(frozen=True)
class LayerShape:
    """What the launches of one step have in common. widest: super-blocks of the widest input. tiles: as
    LayerPhases.block_tiles, the most of any."""

    types: tuple[str, str]
    tokens: int
    widest: int
    tiles: tuple[int, ...]

    @staticmethod
    def of(phases: Sequence[LayerPhases], tokens: int, blocks: int) -> LayerShape | None:
        """None where a weight is not tiled, or there are more than two types."""
        types = type_pair(w for p in phases for matrices in p.products for w in matrices.weights)
        if types is None:
            return None
        tiles = [max(counts) for counts in zip(*(p.block_tiles(blocks) for p in phases), strict=True)]
        return LayerShape(types, tokens, max(p.widest for p in phases), tuple(tiles))

    def longest(self, warps: int) -> int:
        """Tiles that a warp gets at most."""
        return sum(-(-count // warps) for count in self.tiles)

    def shared_bytes(self, warps: int) -> int:
        """Dynamic shared memory of a block: ring and barriers, parts of sums, what stays fixed, activations, lists."""
        ring = warps * STAGES * (max(TILE_BYTES[name] for name in self.types) + 8)
        activations = self.widest * (32 + 2 * self.tokens * (256 + 48))
        return ring + warps * 1024 + _FIXED_BYTES + activations + 8 * warps * self.longest(warps)

    def warps(self, limit: int) -> int:
        """The most warps whose shared memory stays within `limit`; 0: the kernel cannot serve."""
        return next((warps for warps in WARPS if self.shared_bytes(warps) <= limit), 0)


def type_pair(weights: Iterable[QuantTensor]) -> tuple[str, str] | None:
    """The one or two types of all these weights, in the order they come; None: not all tiled, or more than two."""
    names: list[str] = []
    for w in weights:
        if not isinstance(w, TiledTensor):
            return None
        if w.type.name not in names:
            names.append(w.type.name)
    return (names[0], names[-1]) if 0 < len(names) <= 2 else None


class LayerKernel:
    """For one number of tokens; all launches of a step share its places, and follow one another on one stream.

    places: int64 [ranks] on the device, for every rank the address of `places_bytes` bytes of its memory as this GPU
    sees it, all of them -0.0 at first. own: what keeps this rank's places alive. inner: columns of the down projection.
    warps, overlap: other than what the device is best served with; without overlap the copies of weights are those of
    GPUs before compute capability 9.0.
    """

    def __init__(
        self,
        tiles: TileKernels,
        shape: LayerShape,
        dtype: torch.dtype,
        *,
        hidden: int,
        rank: int,
        places: torch.Tensor,
        own: object,
        inner: int,
        warps: int | None = None,
        overlap: bool | None = None,
    ) -> None:
        self._warps = shape.warps(tiles.shared_limit) if warps is None else warps
        self._shared = shape.shared_bytes(self._warps) if self._warps else 0
        if self._warps == 0 or self._shared > tiles.shared_limit:
            raise ValueError(f"{shape.tokens} tokens of {256 * shape.widest} columns leave no room for weights")
        self._tiles, self._types, self._rank, self._own = tiles, shape.types, rank, own
        self._places, self._widest, self._longest = places, shape.widest, shape.longest(self._warps)
        self._overlap = tiles.overlap if overlap is None else overlap
        # -0.0 as well: see layer.cu
        self._inner = torch.full((_SETS, shape.tokens, inner), -(1 << 15), dtype=torch.int16, device=tiles.device)
        defines: dict[str, object] = {
            "TYPE": shape.types[0],
            "TYPE_B": shape.types[1],
            "NWARPS": self._warps,
            "NSTAGES": STAGES,
            "BFLOAT_MODE": str(dtype == torch.bfloat16).lower(),
            "HIDDEN": hidden,
            "TOKENS": shape.tokens,
            "RANKS": places.numel(),
            "FIXED_BYTES": _FIXED_BYTES,
        }
        if tiles.overlap and not self._overlap:
            defines["NO_BULK"] = 1
        self._kernel = Program(("gemv.cu", "layer.cu"), defines, tiles.device).kernel("layer")

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
        modulo 3, the same on all ranks; a step makes `launches` launches, this is its `number`-th from 0 on."""
        arguments = (
            *(argument for matrices in phases.products for argument in _arguments(matrices, self._types)),
            *(mixed, residual, new_residual, phases.ffn_norm, _or_null(phases.post_attention_norm)),
            *(phases.next_norm, _or_null(phases.post_ffn_norm), float(eps), out, int(phases.logits), int(gelu)),
            *(self._places, self._inner, steps, launches, number, self._rank, self._widest, self._longest),
        )
        grid, threads = self._tiles.blocks, 32 * self._warps
        launch(self._kernel, grid, threads, self._shared, arguments, overlap=self._overlap)


def places_bytes(hidden: int, tokens: int, ranks: int) -> int:
    """Bytes of the places for partial sums in every rank's memory."""
    return _SETS * 2 * ranks * tokens * hidden * 4


def _arguments(matrices: Matrices, types: tuple[str, str]) -> Sequence[object]:
    weights = matrices.weights
    pad = MAX_MATRICES - len(weights)
    first = weights[0]
    if {(w.cols, w.phase) for w in weights} != {(first.cols, first.phase)} or first.cols % 8 or first.phase % 8:
        raise ValueError("the matrices of a launch must have the same columns, in eights")
    return (
        *(w.tiles for w in weights),
        *[_NULL] * pad,
        _or_null(matrices.bias),
        *(w.rows for w in weights),
        *[0] * pad,
        *(_kinds(weights, types), first.cols, first.phase, first.column_blocks),
    )


def _kinds(weights: Sequence[TiledTensor], types: tuple[str, str]) -> int:
    """Bit i: weight i is of the second type."""
    return sum(1 << i for i, w in enumerate(weights) if w.type.name != types[0])


def _or_null(tensor: torch.Tensor | None) -> torch.Tensor:
    return _NULL if tensor is None else tensor
