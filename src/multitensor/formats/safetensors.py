"""A Hugging Face folder (config.json, index, shards), or one .safetensors file -> Checkpoint. Only headers are read.

Source: the safetensors format (8 bytes of header length, a JSON header of name -> dtype, shape, data_offsets, then
the data), and the index that `transformers` writes beside several shards (`weight_map`: name -> file).
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint, TensorInfo, map_file, shape_text, short
from multitensor.formats.quant_types import QUANT_TYPES, QuantType

_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_JSON = 100_000_000
_MAX_DIMS = 16
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
# safetensors names that GGUF's names would also fit; MXFP4 and the like are GGUF's alone.
_DTYPES: Mapping[str, QuantType] = {
    name: QUANT_TYPES[name]
    for name in (
        *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64"),
        *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4"),
    )
}


def open_safetensors(path: Path) -> Checkpoint:
    """Opens a folder, or a .safetensors, index or config.json file in one. Raises InputError."""
    folder = path if path.is_dir() else path.parent
    index = _index_of(path, folder)
    main = index or _single_file(path, folder)
    config = _read_config(folder / "config.json")
    files, tensors = _open_indexed(main) if index else ((main,), _read_header(main, 0))
    return Checkpoint("safetensors", path, files, config["model_type"], config, tensors)


def _index_of(path: Path, folder: Path) -> Path | None:
    """The index to follow, or None when one file is the whole model."""
    if path.name.endswith(".index.json"):
        return path
    if path.name.endswith(".safetensors"):
        shard = _SHARD_NAME.fullmatch(path.name)
        index = path.with_name(f"{shard.group(1)}.safetensors.index.json") if shard else None
        return index if index is not None and index.exists() else None
    index = folder / _INDEX
    return index if index.exists() else None


def _single_file(path: Path, folder: Path) -> Path:
    if path.name.endswith(".safetensors"):
        file = path
    else:
        found = sorted(folder.glob("*.safetensors"))
        if (folder / _SINGLE).exists():
            found = [folder / _SINGLE]
        if not found:
            pickled = any(folder.glob("pytorch_model*.bin"))
            hint = "; it has pickled weights (.bin), which are never opened: convert them to safetensors"
            raise InputError(f"{folder}: has neither {_SINGLE} nor {_INDEX} nor a .gguf file{hint if pickled else ''}")
        if len(found) > 1:
            raise InputError(f"{folder}: has {len(found)} .safetensors files but no {_INDEX}; get the index too")
        file = found[0]
    if _SHARD_NAME.fullmatch(file.name):
        raise InputError(f"{file}: is one of several shards, but their index ({_INDEX}) is missing; get it too")
    return file


def _open_indexed(index: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    """The shards that the index names, and where each of its tensors lies."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map; it is not an index of safetensors shards")
    for name in weight_map.values():
        if not _is_plain_name(name):
            raise InputError(f"{index}: the shard name {short(str(name))} is not a plain file name in its folder")
    names = list(dict.fromkeys(weight_map.values()))
    files = tuple(index.with_name(name) for name in names)
    for file in files:
        if not os.path.exists(file):
            raise InputError(f"{file}: missing; {index.name} names {len(files)} shards, get all of them")
    headers = {name: _read_header(file, number) for number, (name, file) in enumerate(zip(names, files, strict=True))}
    tensors: dict[str, TensorInfo] = {}
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise InputError(f"{index.with_name(name)}: lacks tensor {short(tensor)}, which {index.name} says is in it")
        tensors[tensor] = headers[name][tensor]
    return files, tensors


def _is_plain_name(name: Any) -> bool:
    """Whether it names a file of a folder and nothing outside of it."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 255:
        return False
    return name not in (".", "..") and "/" not in name and "\\" not in name


def _read_config(path: Path) -> dict[str, Any]:
    """config.json as it is. Raises InputError without a model_type, and for weights quantised in ways unknown here."""
    if not os.path.exists(path):
        raise InputError(f"{path}: missing; a model in safetensors needs its config.json beside it")
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise InputError(f"{path}: does not say its model_type")
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise InputError(
                f"{path}: the weights are quantised by {short(str(method or 'an unnamed method'))}, which is not "
                "supported yet; take the unquantised model or a GGUF file of it"
            )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    mapped = map_file(path)
    if len(mapped) > _MAX_JSON:
        raise InputError(f"{path}: has {len(mapped)} bytes; at most {_MAX_JSON} make sense for a JSON file of a model")
    return _parse_json(path, mapped[:])


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object. Raises InputError for bad JSON, bad UTF-8, a key given twice, or anything but an object."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKey as error:
        raise InputError(f"{path}: the key {short(str(error))} is there twice") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON: {str(error).splitlines()[0][:120]}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__} where an object belongs")
    return value


class _DuplicateKey(Exception):
    """Two values of one name in a JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _DuplicateKey(next(key for key, count in counts.items() if count > 1))
    return out


def _read_header(path: Path, number: int) -> dict[str, TensorInfo]:
    """The tensors of one file, which is number `number` of the checkpoint."""
    mapped = map_file(path)
    size = len(mapped)
    length = int.from_bytes(mapped[:8], "little") if size >= 8 else size
    if length > min(size - 8, _MAX_HEADER):
        raise InputError(
            f"{path}: a header of {length} bytes does not fit the file's {size}; "
            "it is truncated, damaged or not safetensors"
        )
    header = _parse_json(path, mapped[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: _tensor(path, number, name, entry, 8 + length, size) for name, entry in header.items()}


def _tensor(path: Path, number: int, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    """One entry of a header, checked. `start`: where the data begins; `size`: of the file."""
    where = f"{path}: tensor {short(name)}"
    shape, offsets = _whole_numbers(entry, "shape"), _whole_numbers(entry, "data_offsets")
    if shape is None or offsets is None or len(offsets) != 2:
        raise InputError(f"{where} has no readable shape and data_offsets; the header is damaged")
    dtype = entry.get("dtype")
    kind = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise InputError(f"{where} is of the unknown type {short(str(dtype))}; known: {', '.join(_DTYPES)}")
    if 0 in shape:
        raise InputError(f"{where} has a dimension of 0: {shape_text(shape)}")
    weights = prod(shape)
    nbytes = kind.row_bytes(weights)
    if weights % kind.block_weights or offsets[1] - offsets[0] != nbytes:
        raise InputError(
            f"{where} of shape {shape_text(shape)} in {kind.name} needs {nbytes} bytes, but its offsets "
            f"{offsets[0]} and {offsets[1]} span {offsets[1] - offsets[0]}; the header is damaged"
        )
    if start + offsets[1] > size:
        raise InputError(
            f"{where} ends at byte {start + offsets[1]}, but the file has {size}; "
            "it is truncated or damaged, get it again"
        )
    return TensorInfo(name, shape, kind, number, start + offsets[0], nbytes)


def _whole_numbers(entry: Any, key: str) -> tuple[int, ...] | None:
    """entry[key] if it is a short list of whole numbers from 0 to 2**63."""
    values = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(values, list) or len(values) > _MAX_DIMS:
        return None
    if not all(type(value) is int and 0 <= value < 1 << 63 for value in values):
        return None
    return tuple(values)
