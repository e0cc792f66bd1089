"""What is computed of the chunks of large sums, a launch each: chunks.cu.

Has run for ranks that share one GPU, not yet for two.

Wires, see parallel/wire.py: "exact", in the numbers' own type; "q8", 8-bit integers with a scale for every GROUP.
"""

from __future__ import annotations

from typing import Literal

import torch

from multitensor.kernels.cuda.program import Program, launch

WireName = Literal["exact", "q8"]
GROUP = 32  # numbers with a common scale; rows of all wires have a multiple of it
_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_THREADS = 256
_BLOCKS = 512  # at most: enough for any GPU's memory, and few beside the products that go on meanwhile
_NULL = torch.empty(0)  # its data_ptr() is 0


class ChunkKernels:
    """parallel/wire.py's ChunkMath on a GPU. numbers must lie at a multiple of four of them, as chunks of tensors with
    rows of a multiple of four do."""

    def __init__(self, ranks: int, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._programs: dict[tuple[WireName, torch.dtype], Program] = {}

    def prepare(self, wire: WireName, dtype: torch.dtype) -> None:
        """Compiles and loads what chunks of these need."""
        for name in ("pack_chunk", "add_chunk", "unpack_chunk"):
            self._program(wire, dtype).kernel(name)

    def pack(self, wire: WireName, numbers: torch.Tensor, length: int, rows: torch.Tensor) -> None:
        arguments = (numbers, len(numbers), rows, rows.shape[0], length, rows.shape[1])
        self._launch("pack_chunk", wire, numbers, rows.shape[0] * length, arguments)

    def add(
        self,
        wire: WireName,
        numbers: torch.Tensor,
        own: torch.Tensor | None,
        received: torch.Tensor,
        rank: int,
        length: int,
        result: torch.Tensor | None,
    ) -> None:
        rows = (_NULL if own is None else own, received, _NULL if result is None else result)
        self._launch(
            "add_chunk", wire, numbers, length, (numbers, len(numbers), *rows, rank, length, received.shape[1])
        )

    def unpack(self, wire: WireName, row: torch.Tensor, length: int, numbers: torch.Tensor) -> None:
        self._launch("unpack_chunk", wire, numbers, length, (row, numbers, len(numbers), length))

    def _launch(
        self, name: str, wire: WireName, numbers: torch.Tensor, total: int, arguments: tuple[object, ...]
    ) -> None:
        if numbers.data_ptr() % (4 * numbers.element_size()):
            raise ValueError("numbers of a chunk do not lie at a multiple of four of them")
        grid = min(_BLOCKS, -(-total // (4 * _THREADS)))
        launch(self._program(wire, numbers.dtype).kernel(name), grid, _THREADS, 0, arguments)

    def _program(self, wire: WireName, dtype: torch.dtype) -> Program:
        if (wire, dtype) not in self._programs:
            defines = {"X_KIND": _KINDS[dtype], "EIGHT_BITS": int(wire == "q8"), "RANKS": self._ranks}
            defines["NTHREADS"] = _THREADS
            self._programs[wire, dtype] = Program(("decode.cu", "chunks.cu"), defines, self._device)
        return self._programs[wire, dtype]
