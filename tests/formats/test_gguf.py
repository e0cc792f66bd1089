"""The GGUF reader against the gguf package's, and against files that lie."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from multitensor.errors import InputError
from multitensor.formats import gguf as gguf_reader
from multitensor.formats.checkpoint import Checkpoint, open_checkpoint
from synthetic import write_gguf

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    head = text(name) + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


ARCHITECTURE = key("general.architecture", STRING, text("llama"))


def header(
    keys: Sequence[bytes] = (ARCHITECTURE,),
    tensors: Sequence[bytes] = (),
    *,
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file byte by byte, true or not."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    out = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return out + bytes(-len(out) % alignment) + data if tensors else out


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def same(ours: Any, theirs: Any) -> bool:
    """Equal in value, and numbers of numpy arrays equal in type to the reader's parts."""
    ours = ours.tolist() if isinstance(ours, np.ndarray) else ours
    return bool(ours == theirs) and type(ours) is type(theirs)


def assert_equal_to_the_gguf_package(checkpoint: Checkpoint) -> None:
    """Metadata (of the first file) and the bytes of every tensor."""
    seen = 0
    for number, path in enumerate(checkpoint.files):
        oracle = gguf.GGUFReader(path)
        for field in oracle.fields.values():
            if number == 0 and not field.name.startswith("GGUF."):
                assert same(checkpoint.metadata[field.name], field.contents()), field.name
        for theirs in oracle.tensors:
            ours = checkpoint.tensors[theirs.name]
            assert ours.file == number and ours.offset == theirs.data_offset and ours.nbytes == theirs.n_bytes
            assert ours.type.name == theirs.tensor_type.name
            assert ours.shape == tuple(int(n) for n in reversed(theirs.shape))
            assert bytes(checkpoint.raw(ours)) == theirs.data.tobytes()
            seen += 1
    assert seen == len(checkpoint.tensors) > 0


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_equals_the_gguf_package(tmp_path: Path, architecture: str) -> None:
    types = {"*ffn*": "Q4_K", "*attn_q*": "Q6_K", "*attn_k*": "Q3_K", "*attn_v*": "IQ4_XS", "*output*": "Q8_0"}
    path = write_gguf(
        tmp_path / "m.gguf", architecture, hidden=256, ffn=512, types=types | {"token_embd*": "BF16"}, no_vocab=False
    )
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.format, checkpoint.architecture, checkpoint.files) == ("gguf", architecture, (path,))
        assert checkpoint.tensors["blk.1.ffn_down.weight"].shape == (256, 512)
        assert_equal_to_the_gguf_package(checkpoint)


@pytest.mark.parametrize("kind", [k.name for k in gguf.GGML_QUANT_SIZES if k.name not in ("Q8_1", "Q8_K")])
def test_every_tensor_type(tmp_path: Path, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[number]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    data = np.random.default_rng(0).integers(0, 256, (2, 3, 2 * size), dtype=np.uint8)
    writer.add_tensor("a", data, raw_shape=(2, 3, 2 * size), raw_dtype=number)
    writer.add_tensor("b", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.tensors["a"].shape == (2, 3, 2 * weights)
    assert checkpoint.tensors["a"].type.name == kind
    assert bytes(checkpoint.raw(checkpoint.tensors["a"])) == data.tobytes()
    assert bytes(checkpoint.raw(checkpoint.tensors["b"], 4, 8)) == np.float32(1).tobytes()


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", n_layers=1, alignment=alignment))
    assert all(info.offset % alignment == 0 for info in checkpoint.tensors.values())
    assert_equal_to_the_gguf_package(checkpoint)


SCALARS: list[tuple[int, str, Any]] = [
    (0, "B", 255), (1, "b", -128), (2, "H", 65535), (3, "h", -32768), (4, "I", 2**32 - 1), (5, "i", -(2**31)),
    (6, "f", 0.5), (10, "Q", 2**64 - 1), (11, "q", -(2**63)), (12, "d", 1e-300),
]  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
def test_every_metadata_type(tmp_path: Path, version: int) -> None:
    keys = [ARCHITECTURE, key("s", STRING, text("grüße \U0001f600\n")), key("empty", STRING, text(""))]
    keys += [key("true", BOOL, b"\1"), key("false", BOOL, b"\0")]
    keys += [key("bools", ARRAY, struct.pack("<IQ", BOOL, 3) + b"\1\0\1")]
    keys += [key("strings", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("") + text("ß"))]
    keys += [key("none", ARRAY, struct.pack("<IQ", STRING, 0))]
    inner = struct.pack("<IQ2i", I32, 2, 1, -2) + struct.pack("<IQ", STRING, 1) + text("x")
    keys += [key("nested", ARRAY, struct.pack("<IQ", ARRAY, 2) + inner)]
    for kind, code, value in SCALARS:
        keys.append(key(f"scalar{kind}", kind, struct.pack(f"<{code}", value)))
        keys.append(key(f"array{kind}", ARRAY, struct.pack(f"<IQ3{code}", kind, 3, value, 0, value)))
    found = open_checkpoint(write(tmp_path / "m.gguf", header(keys, version=version))).metadata
    assert found["s"] == "grüße \U0001f600\n" and found["empty"] == "" and found["none"] == []
    assert found["true"] is True and found["false"] is False and found["bools"].tolist() == [True, False, True]
    assert found["strings"] == ["a", "", "ß"]
    assert [list(part) for part in found["nested"]] == [[1, -2], ["x"]]
    for kind, code, value in SCALARS:
        assert found[f"scalar{kind}"] == value and type(found[f"scalar{kind}"]) is type(value)
        assert found[f"array{kind}"].tolist() == [value, 0, value]
        assert found[f"array{kind}"].dtype.itemsize == struct.calcsize(code)


@pytest.mark.parametrize("given", [1, 3, 5])
def test_split_files_by_any_part(tmp_path: Path, given: int) -> None:
    whole = open_checkpoint(write_gguf(tmp_path / "whole.gguf", seed=3))
    write_gguf(tmp_path / "m.gguf", seed=3, split_max_tensors=5)
    path = tmp_path / f"m-{given:05}-of-00005.gguf"
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == path
    assert [file.name for file in checkpoint.files] == [f"m-{n:05}-of-00005.gguf" for n in range(1, 6)]
    assert list(checkpoint.tensors) == list(whole.tensors)
    assert_equal_to_the_gguf_package(checkpoint)
    for name, info in whole.tensors.items():
        assert bytes(checkpoint.raw(checkpoint.tensors[name])) == bytes(whole.raw(info))


def test_split_files_by_their_folder(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", split_max_tensors=9)
    assert len(open_checkpoint(tmp_path).tensors) == 21
    write_gguf(tmp_path / "other.gguf")
    with pytest.raises(InputError, match="name one of them"):
        open_checkpoint(tmp_path)


def refused(path: Path, pattern: str) -> None:
    """One line, naming the file, matching the pattern."""
    with pytest.raises(InputError, match=pattern) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path.parent) in str(caught.value)


def test_split_files_that_do_not_fit(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", split_max_tensors=5)
    third = tmp_path / "m-00003-of-00005.gguf"
    data = third.read_bytes()
    third.unlink()
    refused(first, "m-00003-of-00005.gguf: missing; the model needs all of its 5 parts")
    third.write_bytes((tmp_path / "m-00002-of-00005.gguf").read_bytes())
    refused(first, "m-00003-of-00005.gguf: says that it is part 2 of 5, its name says 3 of 5")
    third.write_bytes(data)
    first.rename(tmp_path / "renamed.gguf")
    refused(tmp_path / "renamed.gguf", "give the parts their names back")
    refused(third, "m-00001-of-00005.gguf: missing")


def test_split_files_with_a_tensor_twice_or_too_few(tmp_path: Path) -> None:
    def part(number: int, name: str, total: int) -> bytes:
        keys = [key("split.no", 2, struct.pack("<H", number)), key("split.count", 2, struct.pack("<H", 2))]
        keys.append(key("split.tensors.count", I32, struct.pack("<i", total)))
        return header([ARCHITECTURE, *keys], [tensor(name, [1])], data=bytes(4))

    first = write(tmp_path / "m-00001-of-00002.gguf", part(0, "a", 2))
    second = write(tmp_path / "m-00002-of-00002.gguf", part(1, "a", 2))
    refused(first, "m-00002-of-00002.gguf: tensor 'a' is in .*m-00001-of-00002.gguf already")
    write(second, part(1, "b", 2))
    assert list(open_checkpoint(second).tensors) == ["a", "b"]
    write(first, part(0, "a", 3))
    refused(second, "hold 2 tensors, split.tensors.count says 3")


@pytest.mark.parametrize("window", [1, 8, 9, 64, 100, 1 << 20])
@pytest.mark.parametrize("likely", [1, 64])
def test_strings_of_any_length_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, likely: int
) -> None:
    monkeypatch.setattr(gguf_reader, "_WINDOW_BYTES", window)
    monkeypatch.setattr(gguf_reader, "_LIKELY_STRING", likely)
    strings = ["", "a", "ß" * 40, *("x" * n for n in range(120)), "", "", "z" * 3000, "日本"]
    array = struct.pack("<IQ", STRING, len(strings)) + b"".join(text(value) for value in strings)
    path = write(tmp_path / "m.gguf", header([ARCHITECTURE, key("k", ARRAY, array), key("after", U32, b"\7\0\0\0")]))
    metadata = open_checkpoint(path).metadata
    assert (metadata["k"], metadata["after"]) == (strings, 7)
    broken = array[:-6] + b"\xff" * 6
    refused(
        write(path, header([ARCHITECTURE, key("k", ARRAY, broken)])),
        f"string {len(strings) - 1} of .* is not valid UTF-8",
    )
    refused(
        write(path, header([ARCHITECTURE, key("k", ARRAY, array)])[:-1]),
        f"string {len(strings) - 1} of .* runs past the end",
    )


HUGE = 1 << 62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read|cannot mmap"),
    "magic": (header(magic=b"GGML"), "is not a GGUF file .it begins with b'GGML'"),
    "text": (b"hello\n", "is not a GGUF file"),
    "version 1": (header(version=1), "version 1; versions 2 and 3"),
    "version 4": (header(version=4), "version 4; versions 2 and 3"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "key count": (header(n_keys=HUGE), "truncated or damaged"),
    "tensor count": (header(n_tensors=HUGE), "truncated or damaged"),
    "key length": (header([struct.pack("<Q", HUGE) + b"abc" * 9]), "the name of metadata key 0 needs .* bytes"),
    "string length": (header([key("k", STRING, struct.pack("<Q", 2**64 - 1))]), "metadata 'k' needs"),
    "array count": (header([key("k", ARRAY, struct.pack("<IQ", U32, HUGE))]), "metadata 'k' needs"),
    "strings count": (header([key("k", ARRAY, struct.pack("<IQ", STRING, HUGE))]), "metadata 'k' needs"),
    "array string length": (
        header([key("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + struct.pack("<Q", HUGE))]),
        "string 1 of metadata 'k' runs past the end",
    ),
    "arrays count": (header([key("k", ARRAY, struct.pack("<IQ", ARRAY, HUGE))]), "metadata 'k' needs"),
    "nesting": (header([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50)]), "nests arrays more than 8 deep"),
    "value type": (header([key("k", 13, bytes(8))]), "metadata 'k' has the unknown value type 13"),
    "array value type": (header([key("k", ARRAY, struct.pack("<IQ", 99, 1))]), "unknown value type 99"),
    "key twice": (header([ARCHITECTURE, ARCHITECTURE]), "metadata key 'general.architecture' is there twice"),
    "key UTF-8": (header([key(b"\xff\xfe", BOOL, b"\1")]), "the name of metadata key 0 is not valid UTF-8"),
    "value UTF-8": (header([key("k", STRING, text(b"a\xc3"))]), "metadata 'k' is not valid UTF-8"),
    "token UTF-8": (
        header([key("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text(b"\xed\xa0\x80"))]),
        "string 1 of metadata 'k' is not valid UTF-8",
    ),
    "name UTF-8": (header(tensors=[tensor(b"\x80", [1])], data=bytes(4)), "the name of tensor 0 is not valid UTF-8"),
    "no architecture": (header([]), "does not say its architecture"),
    "architecture a number": (header([key("general.architecture", U32, bytes(4))]), "does not say its architecture"),
    "alignment 0": (header([ARCHITECTURE, key("general.alignment", U32, bytes(4))]), "not a power of two"),
    "alignment 24": (header([ARCHITECTURE, key("general.alignment", U32, b"\x18\0\0\0")]), "is '24', not a power"),
    "alignment text": (header([ARCHITECTURE, key("general.alignment", STRING, text("x"))]), "not a power of two"),
    "split count text": (header([ARCHITECTURE, key("split.count", STRING, text("x"))]), "split.count is not a whole"),
    "tensor twice": (header(tensors=[tensor("a", [1])] * 2, data=bytes(4)), "tensor 'a' is there twice"),
    "5 dimensions": (header(tensors=[tensor("a", [1] * 5)], data=bytes(4)), "tensor 'a' has 5 dimensions"),
    "many dimensions": (
        header(tensors=[text("a") + struct.pack("<I", 2**32 - 1) + bytes(64)]),
        "tensor 'a' has 4294967295 dimensions",
    ),
    "dimension 0": (header(tensors=[tensor("a", [4, 0])], data=bytes(4)), "tensor 'a' has a dimension of 0: 0 x 4"),
    "huge dimension": (header(tensors=[tensor("a", [HUGE])], data=bytes(4)), "tensor 'a' of shape .* needs"),
    "dimensions that overflow": (header(tensors=[tensor("a", [1 << 32] * 4)], data=bytes(4)), "needs .* bytes"),
    "rows of half a block": (
        header(tensors=[tensor("a", [128], 12)], data=bytes(72)),
        "rows of 128 weights, no multiple of Q4_K's 256",
    ),
    "type 99": (header(tensors=[tensor("a", [32], 99)], data=bytes(64)), "tensor 'a' is of the unknown type 99"),
    "removed type": (header(tensors=[tensor("a", [32], 31)], data=bytes(64)), r"unknown type 31 \(Q4_0_4_4"),
    "offset unaligned": (
        header(tensors=[tensor("a", [1], 0, 4)], data=bytes(64)),
        "not a multiple of the alignment 32",
    ),
    "offset past the end": (header(tensors=[tensor("a", [1], 0, 64)], data=bytes(64)), "the file has"),
    "offset overflow": (header(tensors=[tensor("a", [8], 0, 2**64 - 32)], data=bytes(64)), "tensor 'a' ends at byte"),
    "data cut": (header(tensors=[tensor("a", [8])], data=bytes(31)), "tensor 'a' ends at byte .*the file has"),
    "long name": (header(tensors=[tensor("x\n" * 5000, [0])]), r"xx?.*\.\.\.' has a dimension of 0"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_without_allocating(tmp_path: Path, case: str) -> None:
    data, pattern = HOSTILE[case]
    path = write(tmp_path / "m.gguf", data)
    tracemalloc.start()
    try:
        refused(path, pattern)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "no such file or folder")
    refused(tmp_path, "has neither model.safetensors nor")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf", "has neither")


def test_an_odd_but_legal_file_opens(tmp_path: Path) -> None:
    odd = header(tensors=[tensor("", []), tensor("b", [1, 2, 3, 4], 0, 32)], data=bytes(128))
    found = open_checkpoint(write(tmp_path / "m.bin", odd)).tensors
    assert found[""].shape == (1,) and found[""].nbytes == 4 and found["b"].shape == (4, 3, 2, 1)


def small_model(tmp_path: Path) -> bytes:
    keys = [ARCHITECTURE, key("n", U32, bytes(4)), key("f", ARRAY, struct.pack("<IQ4f", F32, 4, 1, 2, 3, 4))]
    keys += [key("t", ARRAY, struct.pack("<IQ", STRING, 3) + text("ab") + text("c") + text("ß"))]
    keys += [key("nn", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ2Q", U64, 2, 7, 8))]
    tensors = [tensor("a.weight", [32, 2], 8), tensor("b.weight", [4, 2], 0, 96), tensor("c", [3], 0, 128)]
    return header(keys, tensors, data=bytes(range(140)))


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    data = small_model(tmp_path)
    path = write(tmp_path / "m.gguf", data)
    assert len(open_checkpoint(path).tensors) == 3
    for length in range(len(data)):
        refused(write(path, data[:length]), "m.gguf: ")


def test_flipped_bytes_raise_nothing_else_and_allocate_little(tmp_path: Path) -> None:
    """Any header either opens, and then every byte it promises can be read, or is refused in one line."""
    data, path, opened = small_model(tmp_path), tmp_path / "m.gguf", 0
    values = random.Random(5)
    tracemalloc.start()
    try:
        for _ in range(4000):
            changed = bytearray(data)
            for _ in range(values.randint(1, 4)):
                changed[values.randrange(len(data) - 140)] = values.choice((0, 1, 127, 255, values.randrange(256)))
            path.write_bytes(changed)
            try:
                checkpoint = open_checkpoint(path)
            except InputError as error:
                assert "\n" not in str(error)
                continue
            opened += 1
            assert sum(len(checkpoint.raw(info)) for info in checkpoint.tensors.values()) <= 3 * len(data)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert 100 < opened < 3900
