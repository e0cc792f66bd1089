"""Products of few tokens with float weights, plain row-major tensors, on a CUDA device (see gemv_float.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from multitensor.kernels.cuda.program import Program, launch, shared_limit

MAX_TOKENS = 8
_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_ROWS = 8  # of a group, as in gemv_float.cu
_INPUT_PAD = 64  # bytes between tokens
_ROWS_OF_A_BLOCK = {False: 512, True: 2048}  # at most, by whether shared memory is large: sums take some of it
_LARGE_SHARED = 160 << 10
_MULTIPROCESSORS = 512  # that gemv_float.cu keeps counters for
_RESERVED = 1024  # bytes of shared memory that the device keeps for itself with every block


@dataclass(frozen=True)
class Shape:
    """How a block works: see the defines of the same names in gemv_float.cu."""

    warps: int
    stages: int
    chunk_bytes: int

    @property
    def ring_bytes(self) -> int:
        return self.warps * self.stages * (_ROWS * (self.chunk_bytes + 64) + 8)

    @property
    def slot_bytes(self) -> int:
        return self.warps * 2 * 8 * _ROWS * 4


# Measured on an H200: long copies where there is much to read, more warps where the launch is short.
LARGE = Shape(warps=4, stages=2, chunk_bytes=1024)
SMALL = Shape(warps=8, stages=2, chunk_bytes=512)
_LARGE_BYTES = 64 << 20
_LIBRARY_BYTES = 96 << 20


class FloatKernels:
    """The kernels of gemv_float.cu, compiled a pair of types at a time when first asked for.

    One stream at a time: the kernels time their loads by counters that they share. shape: not the measured choice.
    """

    def __init__(self, device: torch.device, shape: Shape | None = None) -> None:
        self.device = device
        self.shape = shape
        properties: Any = torch.cuda.get_device_properties(device)
        self.blocks = properties.multi_processor_count
        self.shared_limit = shared_limit(device)
        self.shared_of_multiprocessor = properties.shared_memory_per_multiprocessor
        self._turns = torch.zeros(2 * _MULTIPROCESSORS, dtype=torch.int32, device=device)
        self._programs: dict[tuple[torch.dtype, torch.dtype, int, Shape], Program] = {}

    @cached_property
    def _capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.device)

    @property
    def overlap(self) -> bool:
        """Programmatic dependent launch (and the ring of bulk copies) exist from compute capability 9.0 on."""
        return self._capability >= (9, 0)

    def takes(self, x: torch.Tensor, w: torch.Tensor) -> bool:
        """Whether `multiply` can do x [T, K] @ w [N, K].T."""
        return (
            0 < x.shape[0] <= MAX_TOKENS
            and x.dtype in (torch.float16, torch.bfloat16)
            and w.dtype in _KINDS
            and w.stride(1) == 1
            and w.numel() > 0
        )

    def pays(self, x: torch.Tensor, w: torch.Tensor) -> bool:
        """Whether `multiply` is the better choice than cuBLAS, as measured on an H200 in bfloat16.

        Alone, one token: level at 117 MB and more, 8 to 25% faster below; two to four: 3 to 20% faster below, 2 to 5%
        slower above (at four tokens level in the middle); from five on cuBLAS is. In a chain with other kernels the
        large ones lose what early starts promise: blocks that start beside another kernel's land unevenly
        (docs/perf-log.md), so large matrices are cuBLAS's whatever the tokens. cuBLAS does not take two types.
        """
        if x.dtype != w.dtype:
            return True
        return x.shape[0] <= 4 and w.numel() * w.element_size() < _LIBRARY_BYTES

    def multiply(self, x: torch.Tensor, w: torch.Tensor, *, float_out: bool = False) -> torch.Tensor:
        """x [T, K] float16 or bfloat16, w [N, K] float16, bfloat16 or float32, any row stride.

        -> [T, N] in x's type, or float32. Sums are float32. Rows that are not 16-byte aligned, and K that is no
        multiple of 8, take a slower kernel.
        """
        x = x.contiguous()
        tokens, columns = x.shape
        rows = w.shape[0]
        y = torch.empty((tokens, rows), dtype=torch.float32 if float_out else x.dtype, device=self.device)
        shape = self.shape or self._shape(x, w)
        program = self._program(w.dtype, x.dtype, tokens, shape)
        stride = w.stride(0) if rows > 1 else columns
        if not _aligned(x, w, stride):
            kernel, grid = program.kernel("gemv_any"), -(-rows // 8)
            launch(kernel, grid, 256, 0, (w, x, y, rows, columns, stride, tokens, int(float_out)), overlap=self.overlap)
            return y
        grid = max(min(self.blocks, rows), -(-rows // _ROWS_OF_A_BLOCK[self.shared_limit >= _LARGE_SHARED]))
        panel, shared = self._panel(shape, columns, w.element_size(), tokens, -(-rows // grid))
        arguments = (w, x, y, rows, columns, stride, tokens, panel, int(float_out), self._turns)
        launch(program.kernel("gemv"), grid, 32 * shape.warps, shared, arguments, overlap=self.overlap)
        return y

    def _tensor_cores(self, x: torch.dtype, w: torch.dtype) -> bool:
        return x == w and self._capability >= (8, 0)

    def _shape(self, x: torch.Tensor, w: torch.Tensor) -> Shape:
        """Without tensor cores several tokens are bound by arithmetic, which wants warps."""
        large = w.numel() * w.element_size() >= _LARGE_BYTES
        return LARGE if large and (x.shape[0] == 1 or self._tensor_cores(x.dtype, w.dtype)) else SMALL

    def _panel(self, shape: Shape, columns: int, item: int, tokens: int, rows_of_a_block: int) -> tuple[int, int]:
        """(columns of activations in shared memory at a time, bytes of shared memory of a block).

        All columns if they fit half a multiprocessor's memory, so that the next kernel's blocks find room beside these;
        else as few panels as its whole memory allows (more panels for the sake of that room were slower).
        """
        chunk = shape.chunk_bytes // item
        chunks = -(-columns // chunk)
        ring = shape.ring_bytes if self.overlap else 0
        sums = tokens * -(-rows_of_a_block // _ROWS) * _ROWS * 4
        fixed = ring + 16 + shape.slot_bytes + tokens * _INPUT_PAD + sums
        of_a_chunk = chunk * tokens * 2
        half = self.shared_of_multiprocessor // 2 - _RESERVED
        for room, most in ((half, 1), (self.shared_limit, chunks)):
            held = (room - fixed) // of_a_chunk
            if held > 0 and held * most >= chunks:
                panels = -(-chunks // held)
                held = -(-chunks // panels)
                return held * chunk, fixed + held * of_a_chunk
        raise ValueError(f"gemv_float: {fixed} bytes of shared memory leave no room for activations")

    def _program(self, weight: torch.dtype, x: torch.dtype, tokens: int, shape: Shape) -> Program:
        bound = MAX_TOKENS if self._tensor_cores(x, weight) else 1 << (tokens - 1).bit_length()
        key = (weight, x, bound, shape)
        if key not in self._programs:
            defines = {
                "WEIGHT_KIND": _KINDS[weight],
                "INPUT_KIND": _KINDS[x],
                "MAX_TOKENS": bound,
                "NWARPS": shape.warps,
                "NSTAGES": shape.stages,
                "CHUNK_BYTES": shape.chunk_bytes,
            }
            self._programs[key] = Program("gemv_float.cu", defines, self.device)
        return self._programs[key]


def _aligned(x: torch.Tensor, w: torch.Tensor, stride: int) -> bool:
    return (
        x.shape[1] % 8 == 0
        and x.data_ptr() % 16 == 0
        and w.data_ptr() % 16 == 0
        and stride * w.element_size() % 16 == 0
    )
