"""One view over every weight format: name -> shape, type, byte range (layer 1, never imports torch)."""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from multitensor.errors import InputError
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


class _Maps:
    """Read-only memory maps of a checkpoint's files, opened at first use and shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, mmap.mmap] = {}

    def get(self, number: int, path: Path) -> mmap.mmap:
        found = self._open.get(number)
        if found is not None:
            return found
        with self._lock:
            if number not in self._open:
                self._open[number] = map_file(path)
            return self._open[number]

    def close(self) -> None:
        with self._lock:
            maps, self._open = list(self._open.values()), {}
        for mapped in maps:
            try:
                mapped.close()
            except BufferError:
                continue  # someone still holds a view of it: the map goes with its last view


@dataclass(frozen=True)
class Checkpoint:
    """An opened model on disk. Nothing but headers has been read.

    format: "gguf" or "safetensors".
    architecture: as the file names it ("llama", "qwen3", "gemma3"; for safetensors `model_type` of config.json).
    metadata: GGUF key -> value (arrays as lists or numpy arrays, strings as str), or config.json as a dict.

    A pickled checkpoint is its path: whoever unpickles it opens the files anew.
    """

    format: Literal["gguf", "safetensors"]
    path: Path
    files: tuple[Path, ...]
    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    _maps: _Maps = field(default_factory=_Maps, init=False, repr=False, compare=False)

    def raw(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> memoryview:
        """Read-only bytes [start, stop) of the tensor, memory-mapped, copied nowhere. Maps are opened once a file
        and shared; safe to call from several threads. Raises ValueError for a range outside the tensor, InputError
        when the file has become shorter since it was opened."""
        stop = info.nbytes if stop is None else stop
        if not 0 <= start <= stop <= info.nbytes:
            raise ValueError(f"{info.name}: bytes [{start}, {stop}) lie outside the tensor's {info.nbytes}")
        mapped = self._maps.get(info.file, self.files[info.file])
        if info.offset + stop > len(mapped):
            raise InputError(f"{self.files[info.file]}: has become shorter since it was opened; get the file again")
        return memoryview(mapped)[info.offset + start : info.offset + stop]

    def close(self) -> None:
        """Gives the memory maps back; views that are still held stay valid. `raw` may be called again after it."""
        self._maps.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[Path], Checkpoint], tuple[Path]]:
        return open_checkpoint, (self.path,)


def map_file(path: Path) -> mmap.mmap:
    """The whole of a regular file, mapped read-only. Raises InputError for anything else, and for an empty file."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path}: is not a regular file")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read: {error}") from None
    finally:
        os.close(descriptor)


def shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def short(text: str) -> str:
    """A name from a file for an error message: quoted and cut, so that the message stays one line."""
    return repr(text if len(text) <= 80 else text[:80] + "...")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a .gguf file (single, or any part of a -00001-of-0000N set), a Hugging Face folder, or a single
    .safetensors file with its config.json beside it. Raises InputError in one line for anything else."""
    from multitensor.formats.gguf import open_gguf
    from multitensor.formats.safetensors import open_safetensors

    path = Path(path)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        models = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() or not models:
            return open_safetensors(path)
        if len({_set_name(model) for model in models}) > 1:
            raise InputError(f"{path}: holds {len(models)} GGUF files; name one of them")
        return open_gguf(models[0])
    if path.name.endswith((".safetensors", ".safetensors.index.json")) or path.name == "config.json":
        return open_safetensors(path)
    return open_gguf(path)


def _set_name(path: Path) -> str:
    """The name that all parts of a split model share."""
    from multitensor.formats.gguf import SPLIT_NAME

    match = SPLIT_NAME.fullmatch(path.name)
    return match.group(1) if match else path.name
