"""Hugging Face folders against the safetensors library, and folders that lie."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint, open_checkpoint
from synthetic import tiny_hf

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}


def assert_equal_to_the_library(checkpoint: Checkpoint) -> None:
    seen = 0
    for number, path in enumerate(checkpoint.files):
        with safe_open(path, framework="numpy") as theirs:
            for name in theirs.keys():  # noqa: SIM118 (it is no dictionary)
                info, expected = checkpoint.tensors[name], theirs.get_tensor(name)
                assert info.file == number and info.shape == expected.shape
                ours = np.frombuffer(checkpoint.raw(info), expected.dtype).reshape(info.shape)
                assert DTYPES[info.type.name] == expected.dtype and np.array_equal(ours, expected)
                seen += 1
    assert seen == len(checkpoint.tensors) > 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_folder_with_one_file(tmp_path: Path, architecture: str) -> None:
    folder = tiny_hf(tmp_path / "m", architecture, n_layers=1)
    config = json.loads((folder / "config.json").read_text())
    for path in (folder, folder / "model.safetensors", folder / "config.json"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.format == "safetensors" and checkpoint.path == path
        assert checkpoint.architecture == config["model_type"] and checkpoint.metadata == config
        assert_equal_to_the_library(checkpoint)


def test_shards(tmp_path: Path) -> None:
    whole = open_checkpoint(tiny_hf(tmp_path / "whole", n_layers=1, seed=4))
    folder = tiny_hf(tmp_path / "m", n_layers=1, seed=4, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    for path in (folder, shards[1], folder / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(path)
        assert sorted(checkpoint.files) == shards and set(checkpoint.tensors) == set(whole.tensors)
        assert_equal_to_the_library(checkpoint)
        for name, info in whole.tensors.items():
            assert bytes(checkpoint.raw(checkpoint.tensors[name])) == bytes(whole.raw(info))


def test_element_types(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {name: np.arange(12).reshape(3, 4).astype(dtype) for name, dtype in DTYPES.items()}
    arrays["scalar"] = np.array(3.5, np.float32)
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    assert {n: i.type.name for n, i in checkpoint.tensors.items() if n != "scalar"} == {n: n for n in DTYPES}
    assert checkpoint.tensors["scalar"].shape == ()
    assert_equal_to_the_library(checkpoint)


def raw_file(entries: dict[str, Any] | bytes, data: int = 16, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def folder_of(path: Path, data: bytes, config: Any = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (path / "model.safetensors").write_bytes(data)
    return path


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_raw_file_is_right(tmp_path: Path) -> None:
    found = open_checkpoint(folder_of(tmp_path / "m", raw_file({"a": entry(), "__metadata__": {"x": "y"}})))
    assert found.tensors["a"].shape == (2, 2) and bytes(found.raw(found.tensors["a"])) == bytes(16)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read|cannot mmap"),
    "short": (b"abc", "does not fit the file's 3"),
    "header length": (raw_file({"a": entry()}, length=1 << 62), "a header of 4611686018427387904 bytes does not fit"),
    "not JSON": (raw_file(b"{,}"), "is not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "is not valid JSON"),
    "deep JSON": (raw_file(b"[" * 100_000), "is not valid JSON"),
    "huge number": (raw_file(b'{"a": ' + b"9" * 10_000 + b"}"), "is not valid JSON"),
    "a list": (raw_file(b"[]"), "holds a JSON list"),
    "name twice": (raw_file(b'{"a": 1, "a": 2}'), "the key 'a' is there twice"),
    "no entry": (raw_file({"a": 5}), "tensor 'a' has no readable shape"),
    "no shape": (raw_file({"a": {"dtype": "F32", "data_offsets": [0, 16]}}), "no readable shape"),
    "shape of text": (raw_file({"a": entry(shape=["2"])}), "no readable shape"),
    "shape of booleans": (raw_file({"a": entry(shape=[True, 4])}), "no readable shape"),
    "negative shape": (raw_file({"a": entry(shape=[-2, -2])}), "no readable shape"),
    "many dimensions": (raw_file({"a": entry(shape=[1] * 1000)}), "no readable shape"),
    "three offsets": (raw_file({"a": entry(offsets=[0, 8, 16])}), "no readable shape"),
    "type": (raw_file({"a": entry(dtype="Q4_K")}), "unknown type 'Q4_K'; known: F64, F32"),
    "type a list": (raw_file({"a": entry(dtype=[])}), "unknown type"),
    "dimension 0": (raw_file({"a": entry(shape=[0, 2], offsets=[0, 0])}), "a dimension of 0: 0 x 2"),
    "span": (raw_file({"a": entry(offsets=[0, 12])}), "needs 16 bytes, but its offsets 0 and 12 span 12"),
    "reversed": (raw_file({"a": entry(offsets=[16, 0])}), "span -16"),
    "overflow": (raw_file({"a": entry(shape=[1 << 62] * 4, offsets=[0, 16])}), "needs .* bytes"),
    "past the end": (raw_file({"a": entry(offsets=[16, 32])}), "tensor 'a' ends at byte .* but the file has"),
    "truncated": (raw_file({"a": entry()}, data=15), "tensor 'a' ends at byte"),
    "long name": (raw_file({"x\n" * 5000: entry(dtype="?")}), r"\.\.\.' is of the unknown type"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    data, pattern = HOSTILE[case]
    folder = folder_of(tmp_path / "m", data)
    tracemalloc.start()
    try:
        refused(folder, pattern)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"model_type": ""}, "config.json: does not say its model_type"),
        ({"model_type": 5}, "does not say its model_type"),
        (["model_type"], "holds a JSON list"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
            "quantised by 'gptq', .*not supported",
        ),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "quantised by 'awq'"),
        ({"model_type": "llama", "quantization_config": {"load_in_4bit": True}}, "'an unnamed method'"),
        ({"model_type": "llama", "compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        (
            {"model_type": "gemma3", "text_config": {"quantization_config": {"quant_method": "fp8"}}},
            "quantised by 'fp8'",
        ),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: Any, pattern: str) -> None:
    refused(folder_of(tmp_path / "m", raw_file({"a": entry()}), config), pattern)


def test_folders_that_lack_something(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", raw_file({"a": entry()}))
    (folder / "config.json").rename(folder / "kept")
    refused(folder, "config.json: missing")
    (folder / "kept").rename(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    refused(folder, "is one of several shards, but their index .* is missing")
    refused(folder / "model-00001-of-00002.safetensors", "is one of several shards")
    (folder / "other.safetensors").write_bytes(b"")
    refused(folder, "has 2 .safetensors files but no model.safetensors.index.json")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    refused(folder, "has neither model.safetensors nor model.safetensors.index.json")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "pickled weights")


@pytest.mark.parametrize(
    ("index", "pattern"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "'../model.safetensors' is not a plain file name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd' is not a plain file name"),
        ({"weight_map": {"a": "..\\model.safetensors"}}, "is not a plain file name"),
        ({"weight_map": {"a": ".."}}, "is not a plain file name"),
        ({"weight_map": {"a": ""}}, "is not a plain file name"),
        ({"weight_map": {"a": "x\ny"}}, "is not a plain file name"),
        ({"weight_map": {"a": "\ud800"}}, "is not a plain file name"),
        ({"weight_map": {"a": "x" * 5000}}, "is not a plain file name"),
        ({"weight_map": {"a": "x" * 255}}, "x: missing"),
        ({"weight_map": {"a": 5}}, "is not a plain file name"),
        ({"weight_map": {"a": ["x"]}}, "is not a plain file name"),
        ({"weight_map": {"a": "none.safetensors"}}, "none.safetensors: missing; .* names 1 shards"),
        ({"weight_map": {"b": "model.safetensors"}}, "model.safetensors: lacks tensor 'b'"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ([], "holds a JSON list"),
    ],
)
def test_indexes_that_are_refused(tmp_path: Path, index: Any, pattern: str) -> None:
    folder = folder_of(tmp_path / "m", raw_file({"a": entry()}))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, pattern)


def test_damaged_headers_raise_nothing_else(tmp_path: Path) -> None:
    """Truncated at every byte: refused. With bytes changed: opened, and then readable to the end, or refused."""
    header = {"a": entry(), "b": entry("F16", [8], [16, 32]), "__metadata__": {"format": "pt"}}
    data, values, opened = raw_file(header, data=32), random.Random(7), 0
    folder = folder_of(tmp_path / "m", data)
    assert len(open_checkpoint(folder).tensors) == 2
    for length in range(len(data)):
        (folder / "model.safetensors").write_bytes(data[:length])
        refused(folder, "model.safetensors: ")
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(values.randint(1, 3)):
            changed[values.randrange(len(data) - 32)] = values.choice(b'0123456789"{}[],:-.e\\ \x00\xff')
        (folder / "model.safetensors").write_bytes(changed)
        try:
            checkpoint = open_checkpoint(folder)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        opened += 1
        assert all(len(checkpoint.raw(info)) == info.nbytes for info in checkpoint.tensors.values())
    assert 50 < opened < 2900
