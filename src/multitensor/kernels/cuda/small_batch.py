"""Products of tiled weights with 5 to 64 tokens on a CUDA device: every weight is read once (see gemm.cu).

Two launches: one puts the activations in the order of the tensor cores' operands (activations.cu), one multiplies.
A token's result has the same bits whatever the other tokens are and however many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from multitensor.kernels.cuda.program import Program, launch, shared_limit
from multitensor.kernels.cuda.tiles import ROWS, TILE_BYTES, TiledTensor, pair_of_types

MAX_TOKENS = 64
MAX_MATRICES = 3
MAX_STAGES = 6
TOKEN_TILES = (1, 2, 4, 8)  # of eight tokens: one variant of the kernel each
CHUNK_BYTES = 4096 + 256 + 512  # activations of eight tokens and 256 columns, with two kinds of sums
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


class SmallBatchKernels:
    """The kernels of gemm.cu, compiled for two types, an activation type and a number of tokens when first asked for.

    One stream at a time: launches share a workspace. shapes: by token tiles, not the usual choice; all of one number of
    slots, or a token's bits depend on the tokens beside it.
    """

    def __init__(self, device: torch.device, shapes: dict[int, Shape] | None = None) -> None:
        self.device = device
        self.blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.shared_limit = shared_limit(device)
        self.shapes = shapes or _shapes(self.shared_limit)
        self._programs: dict[tuple[tuple[str, str], torch.dtype, int, bool, int], Program] = {}
        self._workspaces: dict[int, torch.Tensor] = {}

    @cached_property
    def overlap(self) -> bool:
        """Programmatic dependent launch exists from compute capability 9.0 on."""
        return torch.cuda.get_device_capability(self.device) >= (9, 0)

    @cached_property
    def _packing(self) -> Program:
        return Program("activations.cu", {}, self.device)

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
        tiles = token_tiles(tokens)
        slots = self.shapes[tiles].slots
        rows = sum(2 * _padded_groups(w) for w in weights)  # gated or not
        return -(-rows // slots) <= _COUNTERS and stages(weights, slots, tiles, self.shared_limit) >= 2

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
        tokens, first = x.shape[0], weights[0]
        tiles = token_tiles(tokens)
        packed, scales = self._pack(x, first, tiles)
        shape = self.shapes[tiles]
        types, kinds = pair_of_types(weights)
        count = stages(weights, shape.slots, tiles, self.shared_limit)
        width = first.rows if gated else sum(w.rows for w in weights)
        y = torch.empty((tokens, width), dtype=torch.float32 if float_out else x.dtype, device=self.device)
        panels = panels_of(weights, shape.slots, gated=gated is not None)
        grid = min(self.blocks, panels * first.column_blocks)
        name = "gemm_gated" if gated else "gemm_float" if float_out else "gemm"
        kernel = self._program(types, x.dtype, tiles, gated is not None, count).kernel(name)
        pad = MAX_MATRICES - len(weights)
        arguments = (
            *(w.tiles for w in weights),
            *[_NULL] * pad,
            *(packed, scales, y, _NULL if bias is None else bias, self._workspace(tiles), self._counters),
            *(w.rows for w in weights),
            *[0] * pad,
            *(kinds, first.column_blocks, panels, tokens, int(gated == "gelu_tanh")),
        )
        shared = shared_bytes(weights, shape.slots, tiles, count)
        launch(kernel, grid, 32 * shape.warps, shared, arguments, overlap=self.overlap)
        return y

    def _pack(self, x: torch.Tensor, w: TiledTensor, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous()
        blocks = w.column_blocks
        packed = torch.empty(blocks * tiles * CHUNK_BYTES, dtype=torch.uint8, device=self.device)
        scales = torch.empty(8 * tiles, dtype=torch.float32, device=self.device)
        kernel = self._packing.kernel("pack_bfloat" if x.dtype == torch.bfloat16 else "pack_half")
        arguments = (x, packed, scales, w.cols, w.phase, blocks, tiles)
        launch(kernel, x.shape[0], min(1024, 32 * blocks), 0, arguments, overlap=self.overlap)
        return packed, scales

    def _workspace(self, tiles: int) -> torch.Tensor:
        """Two runs a block may be cut; float32 sums of a panel each."""
        if tiles not in self._workspaces:
            size = self.blocks * 2 * self.shapes[tiles].slots * ROWS * 8 * tiles
            self._workspaces[tiles] = torch.empty(size, dtype=torch.float32, device=self.device)
        return self._workspaces[tiles]

    def _program(self, types: tuple[str, str], dtype: torch.dtype, tiles: int, gated: bool, count: int) -> Program:
        key = (types, dtype, tiles, gated, count)
        if key not in self._programs:
            defines = {
                "TYPE": types[0],
                "TYPE_B": types[1],
                "NWARPS": self.shapes[tiles].warps,
                "ROW_TILES": self.shapes[tiles].row_tiles,
                "TOKEN_TILES": tiles,
                "NSTAGES": count,
                "GATED_MODE": int(gated),
                "BFLOAT_MODE": str(dtype == torch.bfloat16).lower(),
            }
            self._programs[key] = Program(("gemv.cu", "gemm.cu"), defines, self.device)
        return self._programs[key]


def _shapes(shared: int) -> dict[int, Shape]:
    """Where shared memory allows it a warp takes two row groups: it reads a token's numbers half as often, and has two
    chains of products under way (docs/perf-log.md)."""
    return dict.fromkeys(TOKEN_TILES, Shape(8, 1) if shared < _LARGE_SHARED else Shape(8, 2))


def token_tiles(tokens: int) -> int:
    return next(tiles for tiles in TOKEN_TILES if 8 * tiles >= tokens)


def stage_bytes(weights: Sequence[TiledTensor], slots: int, tiles: int) -> int:
    """One super-block of a panel's row groups and its activations (Stages::BYTES of gemm.cu)."""
    names = [w.type.name for w in weights]
    return slots * max(TILE_BYTES[n] for n in names) + tiles * (4096 + max(_SUMS.get(n, 0) for n in names))


def shared_bytes(weights: Sequence[TiledTensor], slots: int, tiles: int, count: int) -> int:
    """Dynamic shared memory of a block: stages, what gated pairs exchange, barriers, a flag."""
    return count * stage_bytes(weights, slots, tiles) + slots * ROWS * 32 + 16 * count + 16


def stages(weights: Sequence[TiledTensor], slots: int, tiles: int, limit: int) -> int:
    """As many as fit."""
    room = limit - shared_bytes(weights, slots, tiles, 0)
    return min(MAX_STAGES, room // (stage_bytes(weights, slots, tiles) + 16))


def panels_of(weights: Sequence[TiledTensor], slots: int, *, gated: bool) -> int:
    """Runs of `slots` row groups, as `place` of gemm.cu numbers them."""
    if gated:
        return -(-weights[0].tiles.shape[0] // (slots // 2))
    return -(-sum(_padded_groups(w) for w in weights) // slots)


def _padded_groups(w: TiledTensor) -> int:
    return (w.tiles.shape[0] + 1) // 2 * 2
