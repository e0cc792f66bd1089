"""The view that both formats share: byte ranges, threads, pickling, closing."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from multitensor.errors import InputError
from multitensor.formats.checkpoint import Checkpoint, open_checkpoint
from synthetic import write_gguf


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_gguf(tmp_path / "m.gguf", n_layers=1, split_max_tensors=4))


def test_raw_is_a_read_only_view_of_the_file(checkpoint: Checkpoint) -> None:
    info = checkpoint.tensors["blk.0.ffn_up.weight"]
    whole = checkpoint.files[info.file].read_bytes()[info.offset : info.offset + info.nbytes]
    view = checkpoint.raw(info)
    assert view.readonly and bytes(view) == whole
    assert bytes(checkpoint.raw(info, 100, 104)) == whole[100:104]
    assert bytes(checkpoint.raw(info, 100)) == whole[100:]
    assert len(checkpoint.raw(info, 8, 8)) == 0
    for start, stop in ((-1, 4), (8, 4), (0, info.nbytes + 1)):
        with pytest.raises(ValueError, match="lie outside the tensor"):
            checkpoint.raw(info, start, stop)


def test_a_file_that_shrinks_is_noticed(checkpoint: Checkpoint) -> None:
    info = list(checkpoint.tensors.values())[-1]
    os.truncate(checkpoint.files[info.file], info.offset + 4)
    assert len(checkpoint.raw(info, 0, 4)) == 4
    with pytest.raises(InputError, match="has become shorter"):
        checkpoint.raw(info)


def test_many_threads_share_the_maps(checkpoint: Checkpoint) -> None:
    files = [path.read_bytes() for path in checkpoint.files]

    def equal(name: str) -> bool:
        info = checkpoint.tensors[name]
        return bytes(checkpoint.raw(info)) == files[info.file][info.offset : info.offset + info.nbytes]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(equal, list(checkpoint.tensors) * 20))


def test_close_keeps_views_alive_and_frees_the_rest(checkpoint: Checkpoint) -> None:
    infos = list(checkpoint.tensors.values())
    held = checkpoint.raw(infos[0])
    expected = bytes(held)
    assert infos[-1].file != infos[0].file
    checkpoint.raw(infos[-1])
    checkpoint.close()
    checkpoint.close()
    assert bytes(held) == expected and bytes(checkpoint.raw(infos[0])) == expected


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of memory maps")
def test_no_map_or_descriptor_is_left(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", n_layers=1)
    descriptors = len(os.listdir("/proc/self/fd"))
    with open_checkpoint(path) as checkpoint:
        for info in checkpoint.tensors.values():
            checkpoint.raw(info).release()
        assert str(path) in Path("/proc/self/maps").read_text()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_pickles_as_its_path(checkpoint: Checkpoint) -> None:
    checkpoint.raw(next(iter(checkpoint.tensors.values())))
    data = pickle.dumps(checkpoint)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.tensors == checkpoint.tensors and again.files == checkpoint.files
    for info in again.tensors.values():
        assert bytes(again.raw(info)) == bytes(checkpoint.raw(info))


def test_opening_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(InputError, match="is not a regular file"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", n_layers=1)
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be opened: Permission denied"):
        open_checkpoint(path)


def test_formats_do_not_import_torch() -> None:
    code = "import sys, multitensor.formats.checkpoint, multitensor.formats.gguf, multitensor.formats.safetensors\n"
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


def check_real_model(path: Path, architecture: str, tensors: int, vocabulary: int) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture == architecture and len(checkpoint.tensors) == tensors
    tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == vocabulary == checkpoint.tensors["token_embd.weight"].shape[0]
    assert all(type(token) is str for token in tokens)
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    assert last.offset + last.nbytes <= path.stat().st_size < last.offset + last.nbytes + 64


@pytest.mark.models
def test_smollm2(smollm2_path: Path) -> None:
    check_real_model(smollm2_path, "llama", 272, 49152)


@pytest.mark.models
def test_gemma3(gemma3_path: Path) -> None:
    check_real_model(gemma3_path, "gemma3", 236, 262144)
