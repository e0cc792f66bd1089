"""Products with tiled weights on a CUDA device: matrix-vector kernels for few tokens, expansion for many."""

from __future__ import annotations

from functools import cached_property

import torch

from multitensor.kernels.cuda.program import Program, launch
from multitensor.kernels.cuda.tiles import ROWS, TILE_BYTES, TiledTensor

WARPS = 16
STAGES = 2
MAX_COLUMNS = 8  # of the tensor core's B operand: tokens, or half as many with 16-bit activations
_EXPAND = {torch.float16: "expand_half", torch.bfloat16: "expand_bfloat", torch.float32: "expand_float"}


class TileKernels:
    """The kernels of gemv.cu, compiled a type and an activation format at a time when first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.blocks = properties.multi_processor_count
        self.shared_limit = properties.shared_memory_per_block_optin
        self._programs: dict[tuple[str, bool, torch.dtype], Program] = {}

    @cached_property
    def overlap(self) -> bool:
        """Programmatic dependent launch exists from compute capability 9.0 on."""
        return torch.cuda.get_device_capability(self.device) >= (9, 0)

    def _program(self, type_name: str, wide: bool, dtype: torch.dtype) -> Program:
        key = (type_name, wide, dtype)
        if key not in self._programs:
            defines = {
                "TYPE": type_name,
                "NWARPS": WARPS,
                "NSTAGES": STAGES,
                "EXACT_MODE": str(wide).lower(),
                "BFLOAT_MODE": str(dtype == torch.bfloat16).lower(),
            }
            self._programs[key] = Program("gemv.cu", defines, self.device)
        return self._programs[key]

    def shared_bytes(self, w: TiledTensor, columns: int) -> int:
        """Dynamic shared memory of a block: ring, barriers, partial sums, activations (see gemv_body)."""
        ring = WARPS * STAGES * (TILE_BYTES[w.type_name] + 8)
        return ring + 2 * WARPS * 512 + w.column_blocks * (32 + columns * (256 + 48))

    def takes(self, w: TiledTensor, tokens: int) -> bool:
        """Whether one launch of `multiply` can do so many tokens with 8-bit activations."""
        return 0 < tokens <= MAX_COLUMNS and self.shared_bytes(w, tokens) <= self.shared_limit

    def multiply(self, x: torch.Tensor, w: TiledTensor, *, float_out: bool = False) -> torch.Tensor:
        """x [T, cols], float16 or bfloat16, contiguous, T <= 8 -> [T, rows] in x's type, or float32.

        Activations are 16-bit integers where they fit the operand (T <= 4 and shared memory), 8-bit ones beyond.
        """
        tokens = x.shape[0]
        wide = 2 * tokens <= MAX_COLUMNS and self.shared_bytes(w, 2 * tokens) <= self.shared_limit
        y = torch.empty((tokens, w.rows), dtype=torch.float32 if float_out else x.dtype, device=self.device)
        shared = self.shared_bytes(w, tokens * (1 + wide))
        kernel = self._program(w.type_name, wide, x.dtype).kernel("gemv_float" if float_out else "gemv")
        arguments = (w.tiles, x, y, w.rows, w.cols, w.phase, w.column_blocks, tokens)
        launch(kernel, min(self.blocks, w.tiles.shape[0]), 32 * WARPS, shared, arguments, overlap=self.overlap)
        return y

    def expand(self, w: TiledTensor, dtype: torch.dtype, first_row: int = 0, rows: int | None = None) -> torch.Tensor:
        """Rows [first_row, first_row + rows) as numbers [rows, cols]; first_row a multiple of 16."""
        count = (w.rows if rows is None else min(first_row + rows, w.rows)) - first_row
        out = torch.empty((count, w.cols), dtype=dtype, device=self.device)
        if count:
            self._expand(w, out, first_row // ROWS, -(-count // ROWS), first_row + count, None)
        return out

    def gather(self, w: TiledTensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ids (int64 [T], each within [0, rows)) as numbers [T, cols]."""
        out = torch.empty((len(ids), ROWS, w.cols), dtype=dtype, device=self.device)
        groups = torch.div(ids, ROWS, rounding_mode="floor")
        self._expand(w, out, 0, len(ids), w.rows, groups)
        picked = (ids - groups * ROWS).view(-1, 1, 1).expand(-1, 1, w.cols)
        return out.gather(1, picked).squeeze(1)

    def _expand(
        self, w: TiledTensor, out: torch.Tensor, first: int, groups: int, rows: int, ids: torch.Tensor | None
    ) -> None:
        kernel = self._program(w.type_name, True, torch.float16).kernel(_EXPAND[out.dtype])
        grid = -(-groups * w.column_blocks // 8)
        null = _Null if ids is None else ids
        arguments = (w.tiles, out, rows, w.cols, w.phase, w.column_blocks, first, groups, null)
        launch(kernel, grid, 256, 0, arguments)


_Null = torch.empty(0)  # data_ptr() of an empty tensor is 0
