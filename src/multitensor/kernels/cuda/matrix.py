"""Products with tiled weights on a CUDA device: matrix-vector kernels for few tokens, expansion for many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch

from multitensor.kernels.cuda.joined import tile_runs
from multitensor.kernels.cuda.program import Program, launch, shared_limit
from multitensor.kernels.cuda.tiles import ROWS, TILE_BYTES, TiledTensor, pair_of_types

WARPS = 16
STAGES = 2
MAX_MATRICES = 3
MAX_TOKENS = 4  # of one launch: the operand's eight columns hold two bytes a token (docs/adr/0004)
_NULL = torch.empty(0)  # its address is 0
_EXPAND = {torch.float16: "expand_half", torch.bfloat16: "expand_bfloat", torch.float32: "expand_float"}


class TileKernels:
    """The kernels of gemv.cu, compiled a pair of types and an activation type at a time when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.blocks = properties.multi_processor_count
        self.shared_limit = shared_limit(device)
        self._programs: dict[tuple[tuple[str, str], torch.dtype], Program] = {}
        self._expanders: dict[tuple[str, torch.dtype], Any] = {}

    @cached_property
    def overlap(self) -> bool:
        """Programmatic dependent launch exists from compute capability 9.0 on."""
        return torch.cuda.get_device_capability(self.device) >= (9, 0)

    def _program(self, types: tuple[str, str], dtype: torch.dtype) -> Program:
        key = (types, dtype)
        if key not in self._programs:
            defines = {
                "TYPE": types[0],
                "TYPE_B": types[1],
                "NWARPS": WARPS,
                "NSTAGES": STAGES,
                "EXACT_MODE": "true",
                "BFLOAT_MODE": str(dtype == torch.bfloat16).lower(),
            }
            self._programs[key] = Program("gemv.cu", defines, self.device)
        return self._programs[key]

    def shared_bytes(self, weights: Sequence[TiledTensor], columns: int) -> int:
        """Dynamic shared memory of a block: ring, barriers, partial sums, activations (see gemv_body)."""
        ring = WARPS * STAGES * (max(TILE_BYTES[w.type.name] for w in weights) + 8)
        return ring + 2 * WARPS * 512 + weights[0].column_blocks * (32 + columns * (256 + 48))

    def takes(self, weights: Sequence[TiledTensor], tokens: int) -> bool:
        """Whether `multiply` can do launches of so many tokens: at most three matrices of at most two types."""
        return (
            0 < tokens <= MAX_TOKENS
            and len(weights) <= MAX_MATRICES
            and len({w.type.name for w in weights}) <= 2
            and len({(w.cols, w.phase) for w in weights}) == 1
            and self.shared_bytes(weights, 2 * tokens) <= self.shared_limit
        )

    def multiply(
        self,
        x: torch.Tensor,
        weights: Sequence[TiledTensor],
        bias: torch.Tensor | None = None,
        *,
        float_out: bool = False,
        gated: Literal["silu", "gelu_tanh"] | None = None,
    ) -> torch.Tensor:
        """x [T, cols], float16 or bfloat16, T <= 4 -> [T, rows of all weights], in x's type or float32.

        gated: two weights of the same rows -> [T, rows] of activation(first) * second.
        bias: float32, of all rows. Activations are 16-bit integers, one scale for 256 of them.
        """
        tokens = x.shape[0]
        types, kinds = pair_of_types(weights)
        width = weights[0].rows if gated else sum(w.rows for w in weights)
        y = torch.empty((tokens, width), dtype=torch.float32 if float_out else x.dtype, device=self.device)
        name = "gemv_gated" if gated else "gemv_float" if float_out else "gemv"
        kernel = self._program(types, x.dtype).kernel(name)
        pad = MAX_MATRICES - len(weights)
        first = weights[0]
        arguments = (
            *(w.tiles for w in weights),
            *[_NULL] * pad,
            x.contiguous(),
            y,
            _NULL if bias is None else bias,
            *(w.rows for w in weights),
            *[0] * pad,
            *(kinds, first.cols, first.phase, first.column_blocks, tokens, int(gated == "gelu_tanh")),
        )
        groups = first.tiles.shape[0] if gated else sum(w.tiles.shape[0] for w in weights)
        shared = self.shared_bytes(weights, 2 * tokens)
        launch(kernel, min(self.blocks, groups), 32 * WARPS, shared, arguments, overlap=self.overlap)
        return y

    def expand(self, w: TiledTensor, dtype: torch.dtype, first_row: int = 0, rows: int | None = None) -> torch.Tensor:
        """Rows [first_row, first_row + rows) as numbers [rows, cols]; first_row a multiple of 16."""
        count = (w.rows if rows is None else min(first_row + rows, w.rows)) - first_row
        out = torch.empty((count, w.cols), dtype=dtype, device=self.device)
        if count:
            self._expand(w, out, first_row // ROWS, -(-count // ROWS), first_row + count, None)
        return out

    def expand_joined(self, weights: Sequence[TiledTensor], dtype: torch.dtype) -> torch.Tensor:
        """The numbers of weights of equal columns, one behind the other: [all rows, cols]."""
        runs = tile_runs(weights)
        rows = [count for _, count in runs]
        out = torch.empty((sum(rows), weights[0].cols), dtype=dtype, device=self.device)
        parts = out.split_with_sizes(rows) if len(runs) > 1 else (out,)
        for (w, count), part in zip(runs, parts, strict=True):
            self._expand(w, part, 0, -(-count // ROWS), count, None)
        return out

    def gather(self, w: TiledTensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ids (int64 [T], each within [0, rows)) as numbers [T, cols]."""
        out = torch.empty((len(ids), ROWS, w.cols), dtype=dtype, device=self.device)
        groups = torch.div(ids, ROWS, rounding_mode="floor")
        self._expand(w, out, 0, len(ids), w.rows, groups)
        picked = (ids - groups * ROWS).view(-1, 1, 1).expand(-1, 1, w.cols)
        return out.gather(1, picked).squeeze(1)

    def embed(
        self,
        w: TiledTensor,
        ids: torch.Tensor,
        slots: torch.Tensor,
        last: torch.Tensor,
        *,
        first: int,
        scale: float,
    ) -> torch.Tensor:
        """Rows ids - first of w, times scale: int32 [T] -> float32 [T, cols]; zeros where w has no such row. An id < 0
        stands for last[slot]: int64, and int32 [T]."""
        name = w.type.name
        out = torch.empty((len(ids), w.cols), dtype=torch.float32, device=self.device)
        kernel = self._program((name, name), torch.float16).kernel("embed")
        rest = (ids, slots, last, first, len(ids), float(scale))
        launch(
            kernel, -(-len(ids) * w.column_blocks // 8), 256, 0, (w.tiles, out, w.rows, w.cols, w.column_blocks, *rest)
        )
        return out

    def _expand(
        self, w: TiledTensor, out: torch.Tensor, first: int, groups: int, rows: int, ids: torch.Tensor | None
    ) -> None:
        name, blocks = w.type.name, w.column_blocks
        kernel = self._expanders.get((name, out.dtype))
        if kernel is None:
            kernel = self._program((name, name), torch.float16).kernel(_EXPAND[out.dtype])
            self._expanders[name, out.dtype] = kernel
        picked = _NULL if ids is None else ids
        arguments = (w.tiles, out, rows, w.cols, w.phase, blocks, first, groups, picked)
        launch(kernel, -(-groups * blocks // 8), 256, 0, arguments)
