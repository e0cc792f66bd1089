"""Products of tiled weights with 5 to 64 tokens on a CUDA device: every weight is read once (gemm.cu).

Two launches: one puts the activations in the order of the tensor cores' operands (activations.cu), one multiplies.
Where shared memory has no room for so many tokens, the same for some of them at a time. A token's result has the same
bits whatever the other tokens are and however many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from multitensor.kernels.cuda.program import Program, launch, shared_limit
from multitensor.kernels.cuda.tiles import COLUMNS, ROWS, TILE_BYTES, TiledTensor, pair_of_types
from multitensor.kernels.quant_tensor import QuantTensor

MAX_TOKENS = 64
FEWEST_TOKENS = 4  # up to here gemv.cu
MAX_MATRICES = 3
MAX_LAUNCHES = 4  # for one product; the weights expanded and read again are eight times their bytes
MAX_STAGES = 6
TOKEN_TILES = (1, 2, 4, 8)  # of eight tokens: one variant of the kernel each
CHUNK_BYTES = 4096 + 256 + 512  # activations of eight tokens and 256 columns, with two kinds of sums
WIDE_TYPES = frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"})  # whose sums run through a super-block
_SUMS = {"Q4_K": 256, "Q5_K": 256, "Q4_1": 256, "Q5_1": 256, "Q2_K": 256 + 512}  # bytes of the sums that a type needs
_COUNTERS = 1 << 14
_LARGE_SHARED = 160 << 10
_NULL = torch.empty(0)  # its address is 0


@dataclass(frozen=True)
class Shape:
    """A block's warps, and the row groups of each: together the slots of a panel."""

    warps: int
    row_tiles: int

    @property
    def slots(self) -> int:
        return self.warps * self.row_tiles


@dataclass(frozen=True)
class PackedRows:
    """Rows [T, columns] once more in the order of the tensor cores' operands, as activations.cu leaves them: `operands`
    bytes, `scales` float32 [8 tiles]. wide: in the order of wgmma."""

    rows: torch.Tensor
    operands: torch.Tensor
    scales: torch.Tensor
    tiles: int
    wide: bool


class SmallBatchKernels:
    """The kernels of gemm.cu, compiled for two types, an activation type and a number of tokens when first asked for.

    One stream at a time: launches share a workspace. shapes: by token tiles, not the usual choice; all of one number of
    slots, or a token's bits depend on the tokens beside it. wide: those for WIDE_TYPES where the tensor cores of
    compute capability 9.0 multiply 64 rows at a time (wgmma); whole fours of warps. norms_pack: see `rows_beside`.
    """

    def __init__(
        self,
        device: torch.device,
        shapes: dict[int, Shape] | None = None,
        wide: dict[int, Shape] | None = None,
        *,
        norms_pack: bool = True,
    ) -> None:
        self.device, self.norms_pack = device, norms_pack
        self.blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.shared_limit = shared_limit(device)
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        self.shapes = shapes or _shapes(self.shared_limit, hopper)
        self.wide = _wide(self.shared_limit, hopper) if wide is None else wide
        self._programs: dict[tuple[tuple[str, str], torch.dtype, int, bool, int, bool], Program] = {}
        self._packings: dict[bool, Program] = {}
        self._workspaces: dict[int, torch.Tensor] = {}
        self._made: PackedRows | None = None

    @cached_property
    def overlap(self) -> bool:
        """Programmatic dependent launch exists from compute capability 9.0 on."""
        return torch.cuda.get_device_capability(self.device) >= (9, 0)

    def _packing(self, wide: bool) -> Program:
        if wide not in self._packings:
            self._packings[wide] = Program("activations.cu", {"WIDE": int(wide)}, self.device)
        return self._packings[wide]

    @cached_property
    def _counters(self) -> torch.Tensor:
        return torch.zeros(_COUNTERS, dtype=torch.int32, device=self.device)

    def takes(self, weights: Sequence[TiledTensor], tokens: int) -> bool:
        """Whether `multiply` can do so many tokens: at most three matrices of at most two types."""
        if not (
            0 < tokens <= MAX_TOKENS
            and 0 < len(weights) <= MAX_MATRICES
            and len({w.type.name for w in weights}) <= 2
            and len({(w.cols, w.phase) for w in weights}) == 1
        ):
            return False
        return tokens <= MAX_LAUNCHES * self.at_once(weights, tokens)

    def at_once(self, weights: Sequence[TiledTensor], tokens: int) -> int:
        """How many of so many tokens one launch can do; 0: none."""
        tiles = token_tiles(tokens)
        while tiles and not self._fits(weights, tiles):
            tiles //= 2
        return min(tokens, 8 * tiles)

    def _fits(self, weights: Sequence[TiledTensor], tiles: int) -> bool:
        """Whether shared memory has room for two stages, and the counters and 32 bits for the panels."""
        shape, together = self._shape(weights, tiles)
        panels = -(-sum(2 * _padded_groups(w, together) for w in weights) // shape.slots)  # gated or not
        return (
            panels <= _COUNTERS
            and panels * weights[0].column_blocks * self.blocks < 1 << 32
            and stages(weights, shape.slots, tiles, self.shared_limit) >= 2
        )

    def _shape(self, weights: Sequence[TiledTensor], tiles: int) -> tuple[Shape, int]:
        """The shape of a block, and how many row groups of a matrix are multiplied together."""
        if self._is_wide(weights, tiles):
            return self.wide[tiles], 4 * self.wide[tiles].row_tiles
        shape = self.shapes[tiles]
        return shape, shape.row_tiles

    def _is_wide(self, weights: Sequence[TiledTensor], tiles: int) -> bool:
        return tiles in self.wide and all(w.type.name in WIDE_TYPES for w in weights)

    def multiply(
        self,
        x: torch.Tensor,
        weights: Sequence[TiledTensor],
        bias: torch.Tensor | None = None,
        *,
        float_out: bool = False,
        gated: Literal["silu", "gelu_tanh"] | None = None,
    ) -> torch.Tensor:
        """x [T, cols], float16 or bfloat16, T <= 64 -> [T, rows of all weights], in x's type or float32.

        gated: two weights of the same rows -> [T, rows] of activation(first) * second.
        bias: float32, of all rows.
        """
        width = weights[0].rows if gated else sum(w.rows for w in weights)
        y = torch.empty((len(x), width), dtype=torch.float32 if float_out else x.dtype, device=self.device)
        most, first = self.at_once(weights, len(x)), 0
        if not most:
            raise ValueError(f"{len(x)} tokens: ask `takes` first")
        while first < len(x):  # once, where shared memory is large
            some = slice(first, first + most)
            self._launch(x[some], weights, bias, y[some], gated)
            first += most
        return y

    def _launch(
        self,
        x: torch.Tensor,
        weights: Sequence[TiledTensor],
        bias: torch.Tensor | None,
        y: torch.Tensor,
        gated: Literal["silu", "gelu_tanh"] | None,
    ) -> None:
        tokens, first = x.shape[0], weights[0]
        tiles = token_tiles(tokens)
        wide = self._is_wide(weights, tiles)
        packed, scales = self._packed(x, first, tiles, wide)
        shape, together = self._shape(weights, tiles)
        types, kinds = pair_of_types(weights)
        count = stages(weights, shape.slots, tiles, self.shared_limit)
        panels = panels_of(weights, shape.slots, together, gated=gated is not None)
        grid = min(self.blocks, panels * first.column_blocks)
        name = "gemm_gated" if gated else "gemm_float" if y.dtype == torch.float32 else "gemm"
        kernel = self._program(types, x.dtype, tiles, gated is not None, count, wide).kernel(name)
        pad = MAX_MATRICES - len(weights)
        arguments = (
            *(w.tiles for w in weights),
            *[_NULL] * pad,
            *(packed, scales, y, _NULL if bias is None else bias, self._workspace(tiles, shape), self._counters),
            *(w.rows for w in weights),
            *[0] * pad,
            *(kinds, first.column_blocks, panels, tokens, int(gated == "gelu_tanh")),
        )
        shared = shared_bytes(weights, shape.slots, tiles, count)
        launch(kernel, grid, 32 * shape.warps, shared, arguments, overlap=self.overlap)

    def rows_beside(self, rows: torch.Tensor, weights: Sequence[QuantTensor]) -> PackedRows | None:
        """Room for `rows` [T, columns] as `multiply` by such weights takes them, to be filled by whoever makes the rows
        (DecodeKernels.add_rms_norm). None where `multiply` would not take them whole."""
        tokens, columns = rows.shape
        tiled = [w for w in weights if isinstance(w, TiledTensor)]
        if len(tiled) < len(weights) or columns % COLUMNS or any(w.phase or w.cols != columns for w in tiled):
            return None
        if (
            not self.norms_pack
            or tokens <= FEWEST_TOKENS
            or not self.takes(tiled, tokens)
            or self.at_once(tiled, tokens) < tokens
        ):
            return None
        tiles = token_tiles(tokens)
        operands, scales = self._room(columns // COLUMNS, tiles)
        return PackedRows(rows, operands, scales, tiles, self._is_wide(tiled, tiles))

    @contextmanager
    def made_beside(self, packed: PackedRows | None) -> Iterator[None]:
        """Within, products of these very rows take what was made beside them."""
        self._made = packed
        try:
            yield
        finally:
            self._made = None

    def _packed(self, x: torch.Tensor, w: TiledTensor, tiles: int, wide: bool) -> tuple[torch.Tensor, torch.Tensor]:
        made = self._made
        if (
            made is not None
            and made.rows.data_ptr() == x.data_ptr()
            and made.rows.shape == x.shape
            and (made.tiles, made.wide, 0) == (tiles, wide, w.phase)
        ):
            return made.operands, made.scales
        return self._pack(x, w, tiles, wide)

    def _room(self, blocks: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.empty(blocks * tiles * CHUNK_BYTES, dtype=torch.uint8, device=self.device),
            torch.empty(8 * tiles, dtype=torch.float32, device=self.device),
        )

    def _pack(self, x: torch.Tensor, w: TiledTensor, tiles: int, wide: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous()
        blocks = w.column_blocks
        packed, scales = self._room(blocks, tiles)
        kernel = self._packing(wide).kernel("pack_bfloat" if x.dtype == torch.bfloat16 else "pack_half")
        arguments = (x, packed, scales, w.cols, w.phase, blocks, tiles)
        launch(kernel, x.shape[0], min(1024, 32 * blocks), 0, arguments, overlap=self.overlap)
        return packed, scales

    def _workspace(self, tiles: int, shape: Shape) -> torch.Tensor:
        """Two runs a block may be cut; float32 sums of a panel each."""
        size = self.blocks * 2 * shape.slots * ROWS * 8 * tiles
        if size not in self._workspaces:
            self._workspaces[size] = torch.empty(size, dtype=torch.float32, device=self.device)
        return self._workspaces[size]

    def _program(
        self, types: tuple[str, str], dtype: torch.dtype, tiles: int, gated: bool, count: int, wide: bool
    ) -> Program:
        key = (types, dtype, tiles, gated, count, wide)
        if key not in self._programs:
            shape = self.wide[tiles] if wide else self.shapes[tiles]
            defines = {
                "TYPE": types[0],
                "TYPE_B": types[1],
                "NWARPS": shape.warps,
                "ROW_TILES": shape.row_tiles,
                "TOKEN_TILES": tiles,
                "NSTAGES": count,
                "GATED_MODE": int(gated),
                "BFLOAT_MODE": str(dtype == torch.bfloat16).lower(),
                "WIDE": int(wide),
            }
            sources = ("gemv.cu", "gemm.cu")
            self._programs[key] = Program(sources, defines, self.device, "a" if wide else "")
        return self._programs[key]


def _shapes(shared: int, hopper: bool) -> dict[int, Shape]:
    """Where shared memory allows it a warp takes two row groups: it reads a token's numbers half as often, and has two
    chains of products under way. On the one GPU that has run both, 9 to 32 tokens are faster with twice the warps
    (docs/perf-log.md)."""
    if shared < _LARGE_SHARED:
        return dict.fromkeys(TOKEN_TILES, Shape(8, 1))
    return {tiles: Shape(16, 1) if hopper and tiles in (2, 4) else Shape(8, 2) for tiles in TOKEN_TILES}


def _wide(shared: int, hopper: bool) -> dict[int, Shape]:
    """wgmma gives the same bits as mma.sync, and takes as long for 8 tokens as for 64: faster from 33 on. It exists on
    compute capability 9.0 alone."""
    return {8: Shape(16, 1)} if hopper and shared >= _LARGE_SHARED else {}


def token_tiles(tokens: int) -> int:
    return next(tiles for tiles in TOKEN_TILES if 8 * tiles >= tokens)


def stage_bytes(weights: Sequence[TiledTensor], slots: int, tiles: int) -> int:
    """One super-block of a panel's row groups and its activations (Stages::BYTES of gemm.cu)."""
    names = [w.type.name for w in weights]
    return slots * max(TILE_BYTES[n] for n in names) + tiles * (4096 + max(_SUMS.get(n, 0) for n in names))


def shared_bytes(weights: Sequence[TiledTensor], slots: int, tiles: int, count: int) -> int:
    """Dynamic shared memory of a block: stages, what gated pairs exchange, barriers."""
    return count * stage_bytes(weights, slots, tiles) + slots * ROWS * 32 + 16 * count


def stages(weights: Sequence[TiledTensor], slots: int, tiles: int, limit: int) -> int:
    """As many as fit."""
    room = limit - shared_bytes(weights, slots, tiles, 0)
    return min(MAX_STAGES, room // (stage_bytes(weights, slots, tiles) + 16))


def panels_of(weights: Sequence[TiledTensor], slots: int, together: int, *, gated: bool) -> int:
    """Runs of `slots` row groups, of which `together` are of one matrix, as `place` of gemm.cu numbers them."""
    if gated:
        return -(-weights[0].tiles.shape[0] // (slots // 2))
    return -(-sum(_padded_groups(w, together) for w in weights) // slots)


def _padded_groups(w: TiledTensor, together: int) -> int:
    """PADDED of gemm.cu"""
    multiple = max(4, together)
    return -(-w.tiles.shape[0] // multiple) * multiple
