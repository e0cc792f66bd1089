"""GGUF version 2 and 3, little-endian -> Checkpoint. Only headers are read, through a memory map.

Nothing in a file is believed: every count and length is compared with what is left of the file before anything is
allocated. Source: the GGUF specification in ggml's documentation, and its description of split files
(`split.no`, `split.count`, `split.tensors.count`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint, TensorInfo, map_file, shape_text, short
from multitensor.formats.quant_types import QUANT_TYPES_BY_ID

SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
# Value types of fixed size: number -> numpy type.
_SCALARS: Mapping[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_WINDOW_BYTES = 1 << 20
_LIKELY_STRING = 64  # bytes, its length included
_MAX_NESTING = 8
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32
_LEAST_KEY = 8 + 4 + 1  # bytes of the shortest key-value pair: empty key, type, one byte
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes of the shortest tensor entry: empty name, no dimensions, type, offset
# Numbers that ggml once had and gave up, with what became of them.
_REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"} | {
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


class _Reader:
    """A position in a file's bytes. Every read is checked against the end; errors name the file and the place."""

    def __init__(self, path: Path, buffer: memoryview) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.position = 0

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}")

    def need(self, nbytes: int, what: str) -> None:
        """Raises InputError unless so many bytes are left."""
        if nbytes > self.size - self.position:
            raise self.fail(
                f"{what} needs {nbytes} bytes at byte {self.position}, but the file ends at {self.size}; "
                "it is truncated or damaged"
            )

    def u32(self, what: str) -> int:
        self.need(4, what)
        (value,) = _U32.unpack_from(self.buffer, self.position)
        self.position += 4
        return int(value)

    def u64(self, what: str) -> int:
        self.need(8, what)
        (value,) = _U64.unpack_from(self.buffer, self.position)
        self.position += 8
        return int(value)

    def string(self, what: str) -> str:
        length = self.u64(what)
        self.need(length, what)
        data = self.buffer[self.position : self.position + length]
        self.position += length
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not valid UTF-8") from None

    def strings(self, count: int, what: str) -> list[str]:
        """A vocabulary has hundreds of thousands of strings: they are taken from copied windows, since slicing bytes
        costs half of slicing the map."""
        self.need(8 * count, what)
        out: list[str] = []
        try:
            while len(out) < count:
                left = count - len(out)
                # No more than a few strings are likely to need: a file may hold very many short arrays.
                length = min(_WINDOW_BYTES, _LIKELY_STRING * left)
                taken = _take_strings(bytes(self.buffer[self.position : self.position + length]), left, out)
                self.position += taken
                if not taken:
                    out.append(self._long_string(f"string {len(out)} of {what}"))
        except UnicodeDecodeError:
            raise self.fail(f"string {len(out)} of {what} is not valid UTF-8") from None
        return out

    def _long_string(self, what: str) -> str:
        """One that is longer than a window, or cut off by the end of the file."""
        left = self.size - self.position - 8
        length = _U64.unpack_from(self.buffer, self.position)[0] if left >= 0 else 0
        if length > left:
            raise self.fail(f"{what} runs past the end of the file ({self.size} bytes); it is truncated or damaged")
        start = self.position + 8
        self.position = start + length
        return str(self.buffer[start : self.position], "utf-8")

    def value(self, kind: int, what: str) -> Any:
        """One metadata value of type number `kind`."""
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what, 1)
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise self.fail(f"{what} has the unknown value type {kind}")
        self.need(dtype.itemsize, what)
        value = np.frombuffer(self.buffer, dtype, 1, self.position)[0]
        self.position += dtype.itemsize
        return bool(value) if kind == _BOOL else value.item()

    def array(self, what: str, depth: int) -> Any:
        """Numbers and booleans become a numpy array, strings and arrays a list."""
        kind, count = self.u32(what), self.u64(what)
        if kind == _STRING:
            return self.strings(count, what)
        if kind == _ARRAY:
            if depth >= _MAX_NESTING:
                raise self.fail(f"{what} nests arrays more than {_MAX_NESTING} deep")
            self.need(12 * count, what)  # each inner array has a type and a count
            return [self.array(what, depth + 1) for _ in range(count)]
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise self.fail(f"{what} is an array of the unknown value type {kind}")
        self.need(dtype.itemsize * count, what)
        values = np.frombuffer(self.buffer, dtype, count, self.position)
        self.position += dtype.itemsize * count
        return values != 0 if kind == _BOOL else values.copy()


def _take_strings(window: bytes, count: int, out: list[str]) -> int:
    """Appends up to `count` strings that lie wholly in the window; returns the bytes taken. No call per string but
    those needed, since this loop is most of what opening a file costs. Raises UnicodeDecodeError."""
    unpack, append, size = _U64.unpack_from, out.append, len(window)
    position = 0
    for _ in range(count):
        start = position + 8
        if start > size:
            break
        end = start + unpack(window, position)[0]
        if end > size:
            break
        append(window[start:end].decode())
        position = end
    return position


@dataclass(frozen=True)
class _Part:
    """The header of one file. The tensors' `file` is 0 still."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def split_count(self) -> int:
        """Files of the model; 1 for a model in one file."""
        return _whole_number(self, "split.count", 1) or 1


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF model by its file, or by any of its files when it is split. Raises InputError."""
    given = _read_header(path)
    parts = _split_parts(given) if given.split_count > 1 else [given]
    metadata: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        for key, value in part.metadata.items():
            metadata.setdefault(key, value)
        for name, info in part.tensors.items():
            if name in tensors:
                raise InputError(f"{part.path}: tensor {short(name)} is in {parts[tensors[name].file].path} already")
            tensors[name] = replace(info, file=number) if number else info
    expected = _whole_number(parts[0], "split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise InputError(f"{parts[0].path}: the parts hold {len(tensors)} tensors, split.tensors.count says {expected}")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise InputError(f"{parts[0].path}: does not say its architecture (metadata key general.architecture)")
    return Checkpoint("gguf", path, tuple(part.path for part in parts), architecture, metadata, tensors)


def _split_parts(given: _Part) -> list[_Part]:
    """All parts of a split model, in order, found by the name of the given one."""
    count = given.split_count
    match = SPLIT_NAME.fullmatch(given.path.name)
    if match is None or int(match.group(3)) != count:
        raise InputError(
            f"{given.path}: is one of {count} parts, but its name does not end in -00001-of-{count:05}.gguf or the "
            "like, so the others cannot be found; give the parts their names back"
        )
    parts = []
    for number in range(count):
        path = given.path.with_name(f"{match.group(1)}-{number + 1:05}-of-{count:05}.gguf")
        if path.name == given.path.name:
            part = given
        elif path.exists():
            part = _read_header(path)
        else:
            raise InputError(f"{path}: missing; the model needs all of its {count} parts")
        found = _whole_number(part, "split.no", -1), part.split_count
        if found != (number, count):
            raise InputError(
                f"{path}: says that it is part {found[0] + 1} of {found[1]}, its name says {number + 1} of {count}"
            )
        parts.append(part)
    return parts


def _whole_number(part: _Part, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{part.path}: metadata {key} is not a whole number")
    return value


def _read_header(path: Path) -> _Part:
    reader = _Reader(path, memoryview(map_file(path)))
    _check_magic(reader)
    n_tensors, n_keys = reader.u64("the number of tensors"), reader.u64("the number of metadata keys")
    reader.need(_LEAST_KEY * n_keys + _LEAST_TENSOR * n_tensors, f"a header of {n_keys} keys and {n_tensors} tensors")
    metadata: dict[str, Any] = {}
    for number in range(n_keys):
        key = reader.string(f"the name of metadata key {number}")
        if key in metadata:
            raise reader.fail(f"metadata key {short(key)} is there twice")
        what = f"metadata {short(key)}"
        metadata[key] = reader.value(reader.u32(what), what)
    return _Part(path, metadata, _read_tensors(reader, n_tensors, _alignment(reader, metadata)))


def _check_magic(reader: _Reader) -> None:
    magic = bytes(reader.buffer[:4])
    if magic != b"GGUF":
        raise reader.fail(f"is not a GGUF file (it begins with {magic!r})")
    reader.position = 4
    version = reader.u32("the version")
    if version and not version & 0xFFFF:
        raise reader.fail("is a big-endian GGUF file; only little-endian ones can be read, convert it again")
    if version not in (2, 3):
        raise reader.fail(f"is of GGUF version {version}; versions 2 and 3 can be read, convert it again")


def _alignment(reader: _Reader, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value & (value - 1):
        raise reader.fail(f"metadata general.alignment is {short(str(value))}, not a power of two")
    return value


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, TensorInfo]:
    """Tensor entries, their offsets made absolute and checked against the end of the file."""
    tensors: dict[str, TensorInfo] = {}
    for number in range(count):
        name = reader.string(f"the name of tensor {number}")
        if name in tensors:
            raise reader.fail(f"tensor {short(name)} is there twice")
        tensors[name] = _read_tensor(reader, name)
    start = -(-reader.position // alignment) * alignment
    for name, info in tensors.items():
        if info.offset % alignment:
            raise reader.fail(
                f"tensor {short(name)} lies at offset {info.offset}, not a multiple of the alignment {alignment}"
            )
        end = start + info.offset + info.nbytes
        if end > reader.size:
            raise reader.fail(
                f"tensor {short(name)} ends at byte {end}, but the file has {reader.size}; "
                "it is truncated or damaged, get it again"
            )
        tensors[name] = replace(info, offset=start + info.offset)
    return tensors


def _read_tensor(reader: _Reader, name: str) -> TensorInfo:
    """One entry after its name; the offset is relative to the tensor data still."""
    what = f"tensor {short(name)}"
    n_dims = reader.u32(what)
    if n_dims > _MAX_DIMS:
        raise reader.fail(f"{what} has {n_dims} dimensions; at most {_MAX_DIMS} are possible")
    # The file has the contiguous dimension first. No dimension at all is one number.
    shape = tuple(reader.u64(what) for _ in range(n_dims))[::-1] or (1,)
    number = reader.u32(what)
    offset = reader.u64(what)
    kind = QUANT_TYPES_BY_ID.get(number)
    if kind is None:
        removed = f" ({_REMOVED_TYPES[number]}, which ggml has given up)" if number in _REMOVED_TYPES else ""
        raise reader.fail(
            f"{what} is of the unknown type {number}{removed}; the file is newer or older than this reader"
        )
    if 0 in shape:
        raise reader.fail(f"{what} has a dimension of 0: {shape_text(shape)}")
    if shape[-1] % kind.block_weights:
        raise reader.fail(f"{what} has rows of {shape[-1]} weights, no multiple of {kind.name}'s {kind.block_weights}")
    nbytes = prod(shape[:-1]) * kind.row_bytes(shape[-1])
    if nbytes > reader.size:
        raise reader.fail(
            f"{what} of shape {shape_text(shape)} in {kind.name} needs {nbytes} bytes, but the file has {reader.size}; "
            "it is truncated or damaged, get it again"
        )
    return TensorInfo(name, shape, kind, 0, offset, nbytes)
