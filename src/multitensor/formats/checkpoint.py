"""One view over every weight format: name -> shape, type, byte range (layer 1, never imports torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from multitensor.formats.quant_types import QuantType


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is row-major as torch prints it: (rows, columns), columns contiguous; (n,) for
    vectors; (experts, rows, columns). `offset` is from the start of file number `file`."""

    name: str
    shape: tuple[int, ...]
    type: QuantType
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened model on disk. Nothing but headers has been read.

    format: "gguf" or "safetensors".
    architecture: as the file names it ("llama", "qwen3", "gemma3"; for safetensors `model_type` of config.json).
    metadata: GGUF key -> value (arrays as lists or numpy arrays, strings as str), or config.json as a dict.
    """

    format: Literal["gguf", "safetensors"]
    path: Path
    files: tuple[Path, ...]
    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def raw(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> memoryview:
        """Read-only bytes [start, stop) of the tensor, memory-mapped, copied nowhere. Maps are opened once a file
        and shared; safe to call from several threads."""
        raise NotImplementedError


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a .gguf file (single, or any part of a -00001-of-0000N set), a Hugging Face folder, or a single
    .safetensors file with its config.json beside it. Raises InputError in one line for anything else."""
    raise NotImplementedError
